"""Ending a run's work, and starting its recorded command again."""

import contextlib
import fcntl
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from circuitmill.cluster import processes, slurm
from circuitmill.cluster.controllers import Controller, RunRecord, read_record, resume_command, unlock_command
from circuitmill.cluster.processes import State
from circuitmill.cluster.status import RunLogs, lost_logs, read_logs
from circuitmill.controllers import FILE
from circuitmill.errors import ClientError, StoreError

_LOCK = Path("logs/resume.lock")
Tell = Callable[[str], None]
"""Is told what was done, a line at a time."""


@dataclass(frozen=True)
class Work:
    """What is recorded of a run that a controller worked on."""

    record: RunRecord
    logs: RunLogs
    controller: Controller
    """The newest."""
    state: State


def find_work(folder: Path, *, elsewhere: bool) -> Work:
    """Look up a run's newest controller.

    Args:
        folder: `results/<run>`.
        elsewhere: Whether a controller of another machine is known to be dead.

    Raises:
        StoreError: no record, or Snakemake's log of that controller is gone.
        ClientError: it was started on another machine and may live there.
    """
    record = read_record(folder)
    controller = record.newest
    if controller is None:
        raise StoreError(
            "a recorded controller of this checkout",
            found=f"only some that worked on {record.foreign[-1].folder}/results" if record.foreign else "none",
            where=record.folder / FILE,
            fix=f"start it: snakemake --config run={record.folder.name}",
        )
    logs = read_logs(record)
    if controller in lost_logs(record, logs):
        raise StoreError(
            "Snakemake's log of the newest controller, which has the name of its Slurm jobs",
            found="no file",
            where=controller.log_path(),
            fix="find the run's jobs with `squeue --me -o '%i %j %Z'`, scancel them, then start snakemake by hand",
        )
    log = logs.newest
    state = processes.state_of(controller, log is not None and log.ended)
    if state == "elsewhere" and not elsewhere:
        raise ClientError(
            "a controller of this machine",
            found=f"process {controller.pid} on {controller.host}, which may live",
            where=record.folder / FILE,
            fix=f"run this on {controller.host}, or say with --elsewhere that it is dead",
        )
    return Work(record, logs, controller, state)


def cancel(folder: Path, *, timeout: float | int, elsewhere: bool, tell: Tell) -> None:
    """End a run's controllers and processes on this machine and its Slurm jobs, and wait until all are gone.

    Args:
        folder: `results/<run>`.
        timeout: Seconds to wait.
        elsewhere: Whether a controller of another machine is known to be dead.

    Raises:
        StoreError: nothing is recorded of the run.
        ClientError: something cannot be ended or asked, or is still there when the time is up.
    """
    work = find_work(folder, elsewhere=elsewhere)
    left = _shares(timeout)
    living = [one for one in work.record.controllers if processes.process_of(one) is not None]
    for controller in living:
        processes.end_controller(controller, left(), tell)
    if not living:
        tell("no controller runs on this machine")
    end_orphans(work, left(), tell)


def end_orphans(work: Work, timeout: float | int, tell: Tell) -> None:
    """End what dead controllers left: their Slurm jobs, and processes on this machine.

    Raises:
        ClientError: Slurm cannot be asked, or something is still there when the time is up.
    """
    left = _shares(timeout)
    if work.logs.run_ids:
        if not slurm.available():
            raise ClientError(
                "Slurm's commands, because the run uses Slurm",
                found="no squeue on PATH",
                where="this machine",
                fix="run this where Slurm can be asked",
            )
        slurm.cancel_jobs(work.logs.run_ids, work.controller.folder, left(), tell)
    processes.end_local_work(work.record.folder, work.controller.folder, left(), tell)


def _shares(timeout: float | int) -> Callable[[], float]:
    """The time that is left for a step, which is a tenth of it even if the steps before took all."""
    end = time.monotonic() + timeout
    return lambda: max(timeout / 10, end - time.monotonic())


def find_resumable(folder: Path, *, elsewhere: bool) -> Work:
    """The run's newest controller, which must be dead.

    Args:
        folder: `results/<run>`.
        elsewhere: Whether a controller of another machine is known to be dead.

    Raises:
        StoreError: nothing is recorded of the run.
        ClientError: the controller lives, or may live on another machine.
    """
    work = find_work(folder, elsewhere=elsewhere)
    living = [one.pid for one in work.record.controllers if processes.process_of(one) is not None]
    if living:
        raise _running(work, f"already running, pid {living[-1]}")
    return work


def _running(work: Work, found: str) -> ClientError:
    return ClientError(
        "a run that no controller works on",
        found=found,
        where=work.record.folder,
        fix=f"let it go on, or end it with `circuitmill cancel {work.record.folder}`",
    )


def plan_resume(work: Work, extra: list[str]) -> list[str]:
    """What `resume` would do, a line each.

    Raises:
        ConfigError: the extra arguments cannot be added.
        ClientError: Slurm does not answer.
    """
    checkout, lines = work.controller.folder, []
    if work.logs.run_ids and slurm.available():
        jobs = [job for job in slurm.jobs_of(work.logs.run_ids, checkout) if job.active]
        lines += [f"scancel {job.id}  # {job.state} {job.comment}".rstrip() for job in jobs]
    lines += [f"kill {process.pid}" for process in processes.local_work(work.record.folder, checkout)]
    lines.append(f"cd {shlex.quote(str(checkout))}")
    lines.append(shlex.join(unlock_command(work.controller.argv)))
    lines.append(shlex.join(resume_command(work.controller.argv, extra)))
    return lines


def resume(work: Work, extra: list[str], *, timeout: float | int, tell: Tell) -> None:
    """End orphans, remove the lock that was left, and become the recorded command; does not return.

    Args:
        work: Of `find_resumable`.
        extra: More options for Snakemake.
        timeout: Seconds to wait for the end of orphans.

    Raises:
        ConfigError: the extra arguments cannot be added.
        ClientError: another `resume` is at work, something of the old work cannot be ended, or Snakemake refuses.
        StoreError: the recorded program is gone.
    """
    command = resume_command(work.controller.argv, extra)
    with _claimed(work):
        end_orphans(work, timeout, tell)
        os.chdir(work.controller.folder)
        _unlock(work)
        tell(f"starting: {shlex.join(command)}")
        try:
            os.execvp(command[0], command)  # noqa: S606  # the point of it: no shell in between
        except OSError as error:
            raise _not_started(command, error) from error


@contextlib.contextmanager
def _claimed(work: Work) -> Iterator[None]:
    """Have no other `resume` start a second controller, as long as this process or the program that it becomes lives.

    Raises:
        ClientError: another one has the claim.
        StoreError: the run is not this user's to write to.
    """
    path = work.record.folder / _LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            "a run that this user may write to", found=error, where=path, fix="ask its owner to resume it"
        ) from error
    try:
        # handed on to the program that replaces this one; what that starts does not get it
        os.set_inheritable(descriptor, True)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _running(work, "another `resume`, or the controller it became") from error
        yield
    finally:
        os.close(descriptor)


def _unlock(work: Work) -> None:
    command = unlock_command(work.controller.argv)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _not_started(command, error) from error
    if done.returncode != 0:
        raise ClientError(
            "Snakemake to remove the lock of the dead controller",
            found="\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]),
            where=shlex.join(command),
            fix="mend what it says, then run this again",
        )


def _not_started(command: list[str], error: OSError) -> StoreError:
    return StoreError(
        "the program that the run was started with",
        found=error,
        where=command[0],
        fix="install it there again, or start snakemake by hand",
    )
