"""GPUs for each of several jobs on a machine that no scheduler shares out.

The workflow names the GPUs of the machine and how many a job of each rule has. A job takes as many, each by a lock on a
file that the kernel lets go when the process ends, however it ends. Without these variables, as in a Slurm job, nothing
is taken: what is visible is the job's own.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import IO

from circuitmill.errors import ConfigError

POOL = "CIRCUITMILL_GPUS"
"""The GPUs, as CUDA_VISIBLE_DEVICES names them: 0,1,2,3."""
SHARES = "CIRCUITMILL_RULE_GPUS"
"""How many a job of a rule has: cache_shard=1,run_train=4. A rule that is not named has none."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
WAIT_S = 120.0
"""Seconds to wait for a GPU whose last process is still ending."""

_log = logging.getLogger(__name__)
_held: list[IO[str]] = []


def lease(rule: str, env: MutableMapping[str, str] = os.environ, wait_s: float = WAIT_S) -> None:
    """Take the GPUs of a rule's job for as long as this process lives, and make them the only visible ones.

    To be called before CUDA starts. What this process starts shares its GPUs.

    Args:
        rule: Of the workflow.
        env: The environment's variables; CUDA_VISIBLE_DEVICES is set there, if there is a pool.
        wait_s: Seconds to wait for them.

    Raises:
        ConfigError: the pool has fewer, or they are not free in time.
    """
    pool = _names(env.get(POOL, ""))
    if not pool:
        return
    number = int(dict(part.split("=") for part in _names(env.get(SHARES, ""))).get(rule, 0))
    if number > len(pool):
        raise ConfigError(
            f"at most {len(pool)} GPUs", found=f"{number} for {rule}", where=f"{POOL}={env[POOL]}", fix="ask for fewer"
        )
    taken = _take(pool, number, wait_s)
    _held.extend(taken.values())
    env[VISIBLE] = ",".join(name for name in pool if name in taken)
    del env[POOL]
    _log.info("GPUs of this job: %s", env[VISIBLE] or "none")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _take(pool: Sequence[str], number: int, wait_s: float) -> dict[str, IO[str]]:
    """Name -> the locked file of so many GPUs."""
    folder = Path(tempfile.gettempdir()) / f"circuitmill-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    until, taken = time.monotonic() + wait_s, {}
    while True:
        for name in pool:
            if name not in taken and len(taken) < number and (file := _locked(folder / f"{name}.lock")):
                taken[name] = file
        if len(taken) == number:
            return taken
        if time.monotonic() > until:
            for file in taken.values():
                file.close()
            rest = [f"{name} by process {(folder / f'{name}.lock').read_text()}" for name in pool if name not in taken]
            raise ConfigError(
                f"{number} free GPUs of {', '.join(pool)} within {wait_s:.0f} s",
                found=f"taken: {', '.join(rest)}",
                where=folder,
                fix="end these processes, or give Snakemake fewer GPUs: --resources gpu=N",
            )
        time.sleep(0.2)


def _locked(path: Path) -> IO[str] | None:
    """The open file, unless another process has it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
