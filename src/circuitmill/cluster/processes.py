"""Controllers as processes of this machine: whether one lives, and how to end it with what it started."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import psutil

from circuitmill.cluster.controllers import Controller
from circuitmill.errors import ClientError

State = Literal["running", "ended", "gone", "elsewhere"]
"""Of a controller: it lives; it wrote its closing words; it is dead without them; it was started on another machine,
where its process cannot be looked up, and wrote no closing words so far."""

_CLOCK_SLACK = 60.0
"""Seconds by which the start of a process, counted from boot, may differ from the clock's."""


def process_of(controller: Controller) -> psutil.Process | None:
    """The controller's process; None if it is dead, its number belongs to another one by now, or it is elsewhere."""
    if not controller.here():
        return None
    try:
        process = psutil.Process(controller.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        words = process.cmdline()
        younger = process.create_time() > controller.started.timestamp() + _CLOCK_SLACK
    except psutil.NoSuchProcess:
        return None
    # the interpreter and its options stand before the words that Python sees as arguments
    arguments = list(controller.argv[1:])
    same = words[len(words) - len(arguments) :] == arguments and any("snakemake" in word for word in words)
    return process if same and not younger else None


def state_of(controller: Controller, ended: bool) -> State:
    """What a controller is at.

    Args:
        ended: Whether its log has the closing words.
    """
    if process_of(controller) is not None:
        return "running"
    if ended:
        return "ended"
    return "gone" if controller.here() else "elsewhere"


def end_controller(controller: Controller, timeout: float | int, tell: Callable[[str], None]) -> None:
    """End a controller of this machine and the processes it started: SIGINT, SIGTERM, SIGKILL, with waits between.

    The jobs that it runs on this machine get SIGTERM at once, on which a training writes a checkpoint.

    Args:
        timeout: Seconds for all of it.
        tell: Is told what was done.

    Raises:
        ClientError: it belongs to another user, or does not even end when it is killed.
    """
    process = process_of(controller)
    if process is None:
        return
    owner = process.uids().real
    if owner != os.getuid():
        raise ClientError(
            f"a controller of user {os.getuid()}",
            found=f"one of user {owner} ({process.username()})",
            where=f"process {controller.pid}",
            fix="ask that user to end it",
        )
    below = process.children(recursive=True)
    _send([process], signal.SIGINT)
    _send(below, signal.SIGTERM)
    used = signal.SIGINT
    if left := _wait([process, *below], timeout / 3):
        used = signal.SIGTERM if process in left else used
        left = _insist(left, timeout / 3)
        used = signal.SIGKILL if process in left else used
    tell(f"controller {controller.pid} ended on {used.name}")


def local_work(folder: Path, checkout: Path) -> list[psutil.Process]:
    """Processes of this user on this machine that write into a run: `circuitmill STAGE ... --out results/<run>/...`.

    Those of Slurm jobs that run on this machine are among them.

    Args:
        folder: `results/<run>`.
        checkout: Their working directory.
    """
    run, here, found = os.path.realpath(folder), os.path.realpath(checkout), []
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and os.path.realpath(process.cwd()) == here:
                places = _written(process.cmdline())
                if any(os.path.realpath(Path(here, place)).startswith(f"{run}{os.sep}") for place in places):
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or one that no user may look at
    return found


def _written(words: Sequence[str]) -> list[str]:
    """The folders that a command line of ours writes to.

    >>> _written(["python", "-m", "circuitmill", "cache", "--out", "a", "b", "--shard", "c"])
    ['a', 'b']
    >>> _written(["python", "-m", "other", "--out", "a"])
    []
    """
    if not any(Path(word).name == "circuitmill" for word in words) or "--out" not in words:
        return []
    behind = list(words[list(words).index("--out") + 1 :])
    end = next((k for k, word in enumerate(behind) if word.startswith("-")), len(behind))
    return behind[:end]


def end_local_work(folder: Path, checkout: Path, timeout: float | int, tell: Callable[[str], None]) -> None:
    """End what a killed controller left on this machine: SIGTERM, on which a training saves its state, then SIGKILL.

    Args:
        folder: `results/<run>`.
        checkout: Working directory of the processes.
        timeout: Seconds.
        tell: Is told what was done.

    Raises:
        ClientError: they do not even end when they are killed.
    """
    if processes := local_work(folder, checkout):
        used = "SIGKILL" if _insist(processes, timeout) else "SIGTERM"
        tell(f"ended on {used} on this machine: {' '.join(str(one.pid) for one in processes)}")


def _insist(processes: list[psutil.Process], timeout: float | int) -> list[psutil.Process]:
    """SIGTERM, and SIGKILL to those that are left after half of the time, which are returned.

    Raises:
        ClientError: some are there after all of it.
    """
    _send(processes, signal.SIGTERM)
    left = _wait(processes, timeout / 2)
    _send(left, signal.SIGKILL)
    if stuck := _wait(left, timeout / 2):
        raise ClientError(
            "an end of processes that were killed",
            found=f"{', '.join(str(one.pid) for one in stuck)} still there",
            where="this machine",
            fix="see what they wait for (a dead file system, mostly), and run this again",
        )
    return left


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        # psutil sends nothing if the number belongs to another process by now
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for their end; those that are left."""
    deadline = time.monotonic() + seconds
    while True:
        left = [one for one in processes if _lives(one)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
