"""Logging and progress: configured once by the command line, used everywhere through the standard library.

On a terminal long work shows a bar with rate and remaining time; elsewhere (a log file, a batch job) a line every
30 seconds says the same.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

LINE_INTERVAL = 30.0
"""Seconds between two progress lines when stderr is not a terminal."""

_log = logging.getLogger(__name__)


def configure(rank: int = 0, *, verbose: bool = False) -> None:
    """Send records to stderr: rank 0 from INFO (DEBUG if verbose), other ranks from WARNING."""
    level = logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("filelock", "urllib3", "httpx", "matplotlib", "fsspec", "datasets", "wandb"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@runtime_checkable
class Progress(Protocol):
    """What long work reports to."""

    def advance(self, amount: int | float = 1) -> None:
        """Say that `amount` more units are done."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar (a loss, say); replaces the earlier ones."""


class _Lines:
    def __init__(self, description: str, total: int | float, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.text = 0.0, ""
        self.start = self.last = time.monotonic()

    def advance(self, amount: int | float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= LINE_INTERVAL:
            self.last = now
            self.line()

    def note(self, text: str) -> None:
        self.text = text

    def line(self) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "no rate yet"
        share = f"{100 * self.done / self.total:.0f}%" if self.total else "-"
        _log.info(
            "%s: %s of %s %s (%s), %s %s/s, %s %s",
            self.description,
            f"{self.done:,.0f}",
            f"{self.total:,.0f}",
            self.unit,
            share,
            f"{rate:,.0f}",
            self.unit,
            left,
            self.text,
        )


class _Bar:
    def __init__(self, bar: object, task: object) -> None:
        self.bar, self.task = bar, task

    def advance(self, amount: int | float = 1) -> None:
        self.bar.advance(self.task, amount)  # type: ignore[attr-defined]

    def note(self, text: str) -> None:
        self.bar.update(self.task, note=text)  # type: ignore[attr-defined]


@contextmanager
def progress(description: str, *, total: int | float, unit: str = "items", done: int | float = 0) -> Iterator[Progress]:
    """Report progress of `total` units of work, `done` of which an earlier run finished.

    Example:
        >>> with progress("caching", total=3, unit="tokens") as bar:
        ...     bar.advance(3)
    """
    if not sys.stderr.isatty():
        lines = _Lines(description, total, unit)
        lines.done = done
        yield lines
        seconds = time.monotonic() - lines.start
        _log.info("%s: %s %s in %.1f s %s", description, f"{lines.done:,.0f}", unit, seconds, lines.text)
        return
    # Imported here because a dry run and every worker that is not on a terminal do without it.
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn(unit),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(description, total=total, completed=int(done), note=""))
