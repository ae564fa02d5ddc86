"""Slurm's side of a run: its jobs, and how to cancel them. Jobs are found by name and working directory, exactly."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.errors import ClientError

FINISHED = frozenset(
    (
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    )
)
"""States from which a job does not come back; Slurm has about twenty others, all of which may still write files."""

_SEPARATOR = "\x1f"
_FIELDS = ("%i", "%j", "%T", "%r", "%P", "%N", "%M", "%Z", "%k")
_POLL = 1.0
_AGAIN = 15.0
"""Seconds after which a job that scancel did not impress is cancelled again."""
_AT_ONCE = 500
"""Jobs per call of scancel."""


@dataclass(frozen=True)
class SlurmJob:
    """A job, or a task of a job array."""

    id: str
    """As squeue writes it: `12`, or `12_3` in an array."""
    name: str
    """The run ID of the controller that submitted it."""
    state: str
    reason: str
    """Why it is pending or how it ended; empty if there is nothing to say."""
    partition: str
    nodes: str
    """Empty while it has none."""
    elapsed: str
    """[days-][hours:]minutes:seconds"""
    folder: Path
    comment: str
    restarts: int = 0
    """How often it was requeued."""

    @property
    def active(self) -> bool:
        """Whether it may still write files."""
        return self.state not in FINISHED

    def rule(self) -> tuple[str, str]:
        """Rule and values of wildcards as the comment has them; those of an array's tasks are all its first one's.

        >>> _job("7", "rule_cache_shard_wildcards_train-00001").rule()
        ('cache_shard', 'train-00001')
        >>> _job("7_2", "rule_cache_shard_wildcards_train-00001").rule()
        ('cache_shard', '')
        """
        name, _, values = self.comment.partition("_wildcards_")
        rule = name.removeprefix("rule_") if name.startswith("rule_") else ""
        return rule, "" if "_" in self.id else values


def _job(job_id: str, comment: str) -> SlurmJob:
    return SlurmJob(job_id, "", "RUNNING", "", "", "", "", Path(), comment)


def parse_squeue(text: str) -> list[SlurmJob]:
    """Jobs of the output of squeue with our format.

    Raises:
        ClientError: it has another form.
    """
    jobs = []
    for line in text.splitlines():
        fields = line.split(_SEPARATOR)
        if len(fields) != len(_FIELDS):
            raise ClientError(
                f"{len(_FIELDS)} fields of a job",
                found=repr(line),
                where="squeue",
                fix="report it with `squeue --version`",
            )
        job_id, name, state, reason, partition, nodes, elapsed, folder, comment = (_known(value) for value in fields)
        jobs.append(SlurmJob(job_id, name, state, reason, partition, nodes, elapsed, Path(folder), comment))
    return jobs


def _known(value: str) -> str:
    return "" if value in ("(null)", "None", "N/A") else value


def parse_restarts(text: str) -> dict[str, int]:
    """Job -> how often it was requeued, from two columns."""
    return {match[1]: int(match[2]) for match in re.finditer(r"^(\S+)\s+(\d+)\s*$", text, re.MULTILINE)}


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def jobs_of(run_ids: Sequence[str], folder: Path) -> list[SlurmJob]:
    """The jobs that controllers submitted from a folder, finished ones too as long as Slurm knows them.

    Args:
        run_ids: Of the controllers.
        folder: Their working directory.

    Raises:
        ClientError: Slurm does not answer.
    """
    if not run_ids:
        return []
    chosen = ("--noheader", "--array", "--all", "--states=all", f"--name={','.join(run_ids)}")
    jobs = parse_squeue(_slurm("squeue", *chosen, f"--format={_SEPARATOR.join(_FIELDS)}"))
    restarts = parse_restarts(_slurm("squeue", *chosen, "--Format=JobArrayID:60,RestartCnt:12"))
    here = os.path.realpath(folder)
    return [
        SlurmJob(**{**vars(job), "restarts": restarts.get(job.id, 0)})
        for job in jobs
        if job.name in run_ids and os.path.realpath(job.folder) == here
    ]


def cancel_jobs(run_ids: Sequence[str], folder: Path, timeout: float | int, tell: Callable[[str], None]) -> None:
    """Cancel the jobs that controllers submitted from a folder, and wait until none of them is left.

    Args:
        timeout: Seconds.
        tell: Is told what was done.

    Raises:
        ClientError: Slurm does not answer, or some are still there when the time is up.
    """
    deadline = time.monotonic() + timeout
    asked: dict[str, float] = {}
    complaints = ""
    while jobs := [job for job in jobs_of(run_ids, folder) if job.active]:
        now = time.monotonic()
        if now > deadline:
            raise ClientError(
                f"an end of all Slurm jobs of the run within {timeout:g} s",
                found=", ".join(f"{job.id} {job.state}" for job in jobs[:8])
                + (f" and {len(jobs) - 8} more" if len(jobs) > 8 else "")
                + (f"; scancel says: {complaints}" if complaints else ""),
                where="squeue",
                fix="wait and run this again, or give it more time with --timeout",
            )
        due = [job.id for job in jobs if job.state != "COMPLETING" and now - asked.get(job.id, -_AGAIN) >= _AGAIN]
        if new := [job for job in jobs if job.id in due and job.id not in asked]:
            tell(f"cancelling {_counted(new)}: {_shortened([job.id for job in new])}")
        asked |= dict.fromkeys(due, now)
        complaints = _scancel(due) or complaints
        time.sleep(_POLL)
    tell(f"no Slurm job of the run is left{f' ({len(asked)} cancelled)' if asked else ''}")


def _counted(jobs: Collection[Any]) -> str:
    return f"{len(jobs)} Slurm job{'s' * (len(jobs) != 1)}"


def _shortened(words: Sequence[str], most: int = 12) -> str:
    more = len(words) - most
    return " ".join(words[:most]) + (f" and {more} more" if more > 0 else "")


def _scancel(job_ids: Sequence[str]) -> str:
    """Cancel jobs; what scancel says about those that ended meanwhile."""
    said = []
    for start in range(0, len(job_ids), _AT_ONCE):
        done = _run("scancel", *job_ids[start : start + _AT_ONCE])
        said.append(done.stderr.strip())
    return " ".join(filter(None, said))


def _slurm(*command: str) -> str:
    done = _run(*command)
    if done.returncode != 0:
        raise ClientError(
            "an answer from Slurm",
            found=done.stderr.strip() or f"exit code {done.returncode}",
            where=command[0],
            fix="try again when `scontrol ping` says that the controller is up",
        )
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClientError(
            "an answer from Slurm", found=error, where=command[0], fix="run this where Slurm's commands work"
        ) from error
