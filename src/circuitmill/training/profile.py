"""What torch's profiler sees of a few steps, as a Chrome trace (chrome://tracing, or ui.perfetto.dev)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from circuitmill.errors import ConfigError

SKIPPED = 10
"""Steps of this process that pass before: they allocate memory and choose kernels."""

_log = logging.getLogger(__name__)


@contextmanager
def recorded(steps: int, path: Path | None) -> Iterator[Callable[[], None]]:
    """Record some steps of the process; a function to be called before each step.

    A training that ends sooner leaves a trace of the steps that there were, and one that ends before the first
    of them a warning.

    Args:
        steps: How many; 0 records nothing and costs nothing.
        path: The trace; its folder is made.

    Raises:
        ConfigError: steps are to be recorded and nobody said where.
    """
    if not steps:
        yield lambda: None
        return
    if path is None:
        raise ConfigError(
            "a file for the trace", found="none", where="train.monitor.profile_steps", fix="set it to 0, or name a file"
        )
    recording = _Recording(steps, path)
    try:
        yield recording.before_step
    finally:
        recording.end()


class _Recording:
    """Starts, stops and writes."""

    def __init__(self, steps: int, path: Path) -> None:
        self._steps, self._path, self._seen = steps, path, 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities)

    def before_step(self) -> None:
        if self._seen == SKIPPED:
            self._profiler.start()
        elif self._seen == SKIPPED + self._steps:
            self._write()
        self._seen += 1

    def end(self) -> None:
        """The training is over."""
        if self._seen <= SKIPPED:
            _log.warning("nothing was profiled: the training had no more than %d steps", SKIPPED)
        elif self._seen <= SKIPPED + self._steps:
            self._write()

    def _write(self) -> None:
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        _log.info("profile of %d steps in %s", min(self._steps, self._seen - SKIPPED), self._path)
