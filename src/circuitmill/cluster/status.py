"""What a run is at: its controller, its Slurm jobs, its manifests and its failed jobs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.cluster import processes, progress, slurm
from circuitmill.cluster.controllers import Controller, RunRecord, read_record, run_and_overrides
from circuitmill.cluster.processes import State
from circuitmill.cluster.progress import StageProgress
from circuitmill.cluster.slurm import SlurmJob
from circuitmill.cluster.snakemake_log import Failure, SnakemakeLog, parse_log, slurm_log
from circuitmill.errors import CircuitmillError, ClientError

_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Tail:
    """The last lines of a log."""

    path: Path
    lines: tuple[str, ...] | None
    """None if there is no such file."""


@dataclass(frozen=True)
class FailedJob:
    """A failed job with the ends of its logs."""

    failure: Failure
    tails: tuple[Tail, ...]


@dataclass(frozen=True)
class QueuedJob:
    """A Slurm job with what it works on."""

    job: SlurmJob
    rule: str
    wildcards: str
    """Their values, in the rule's order; empty if they are not known."""


@dataclass(frozen=True)
class RunLogs:
    """Snakemake's logs of all controllers of a run."""

    logs: tuple[SnakemakeLog | None, ...]
    """Beside the controllers; None where the file is gone."""

    @property
    def run_ids(self) -> list[str]:
        """Names of the run's Slurm jobs."""
        return [log.run_id for log in self.logs if log is not None and log.run_id is not None]

    @property
    def newest(self) -> SnakemakeLog | None:
        """That of the controller that was started last."""
        return self.logs[-1] if self.logs else None


@dataclass(frozen=True)
class RunStatus:
    """What a run is at."""

    folder: Path
    controller: Controller | None
    state: State | None
    stages: tuple[StageProgress, ...]
    jobs: tuple[QueuedJob, ...] | None
    """Those that are pending or running; None if the run uses no Slurm or it cannot be asked."""
    failed: tuple[FailedJob, ...]
    notes: tuple[str, ...]


def read_logs(record: RunRecord) -> RunLogs:
    """Read Snakemake's logs of all controllers."""
    return RunLogs(tuple(_read_log(controller) for controller in record.controllers))


def _read_log(controller: Controller) -> SnakemakeLog | None:
    path = controller.log_path()
    return parse_log(path.read_text(errors="replace")) if path.is_file() else None


def lost_logs(record: RunRecord, logs: RunLogs) -> list[Controller]:
    """The controllers whose Slurm jobs cannot be found, because Snakemake's log is gone."""
    return [controller for controller, log in zip(record.controllers, logs.logs, strict=True) if log is None]


def status_of(folder: Path) -> RunStatus:
    """Gather what a run is at.

    Args:
        folder: `results/<run>`.

    Raises:
        StoreError: no run there, or a record of controllers that cannot be read.
        ConfigError: nothing says what the run consists of.
    """
    record = read_record(folder)
    logs = read_logs(record)
    notes = [
        f"Snakemake's log of controller {one.pid} ({one.started:%Y-%m-%d %H:%M} UTC) is gone, and with it the names"
        f" of its Slurm jobs: {one.log_path()}"
        for one in lost_logs(record, logs)
    ]
    if record.foreign:
        notes.append(
            f"recorded controllers ({len(record.foreign)}) that worked on {record.foreign[-1].folder}/results/"
            f"{record.folder.name}, not on this folder, are passed over"
        )
    controller, log = record.newest, logs.newest
    state = processes.state_of(controller, log is not None and log.ended) if controller else None
    if controller and state == "gone":
        notes += _left_behind(record, controller)
    return RunStatus(
        folder=record.folder,
        controller=controller,
        state=state,
        stages=tuple(_stages(record, notes)),
        jobs=_jobs(controller, logs, notes),
        failed=tuple(_failed(failure, controller.folder) for failure in log.failures.values())
        if controller and log
        else (),
        notes=tuple(notes),
    )


def _left_behind(record: RunRecord, controller: Controller) -> list[str]:
    left = processes.local_work(record.folder, controller.folder)
    pids = " ".join(str(process.pid) for process in left)
    return [f"processes on this machine still write into the run: {pids}"] if left else []


def _stages(record: RunRecord, notes: list[str]) -> list[StageProgress]:
    controller = record.newest
    if controller is None:
        notes.append("no controller is recorded: stages are those whose configuration is in config/")
        return progress.of_frozen(record.folder)
    try:
        experiment, overrides = run_and_overrides(controller.argv)
        run = progress.composed(controller.folder, experiment, overrides)
    except CircuitmillError as error:
        notes.append(
            f"the run cannot be composed as it was started ({error.expected}; found {error.found}): stages are those"
            " whose configuration is in config/"
        )
        return progress.of_frozen(record.folder)
    if run.name != record.folder.name:
        notes.append(
            f"the controller's command line says run {run.name}: stages are those whose configuration is in config/"
        )
        return progress.of_frozen(record.folder)
    return progress.of_run(record.folder, run)


def _jobs(controller: Controller | None, logs: RunLogs, notes: list[str]) -> tuple[QueuedJob, ...] | None:
    if controller is None or not logs.run_ids:
        return None
    if not slurm.available():
        notes.append("the run uses Slurm, whose commands are not on this machine: nothing is known of its jobs")
        return None
    try:
        jobs = slurm.jobs_of(logs.run_ids, controller.folder)
    except ClientError as error:
        notes.append(f"Slurm does not say what the jobs are at: {error.found} ({error.where})")
        return None
    return tuple(_queued(job, logs) for job in jobs if job.active)


def _queued(job: SlurmJob, logs: RunLogs) -> QueuedJob:
    for log in logs.logs:
        if log is not None and log.run_id == job.name and (task := log.task_of(job.id)):
            return QueuedJob(job, task.rule, " ".join(task.wildcards.values()))
    return QueuedJob(job, *job.rule())


def _failed(failure: Failure, checkout: Path) -> FailedJob:
    tails = []
    for name in failure.logs:
        path = checkout / name
        if failure.slurm_job and path.stem == failure.slurm_job:
            path = slurm_log(path, failure.slurm_job)
        tails.append(Tail(path, _last_lines(path)))
    return FailedJob(failure, tuple(tails))


def _last_lines(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        return tuple(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


def plain(status: RunStatus) -> dict[str, Any]:
    """A status as data for JSON."""
    controller = status.controller
    return {
        "run": status.folder.name,
        "folder": str(status.folder),
        "controller": None if controller is None else controller.plain() | {"state": status.state},
        "stages": [stage.plain() for stage in status.stages],
        "jobs": None
        if status.jobs is None
        else [
            {
                "id": one.job.id,
                "rule": one.rule,
                "wildcards": one.wildcards,
                "state": one.job.state,
                "reason": one.job.reason,
                "partition": one.job.partition,
                "nodes": one.job.nodes,
                "elapsed": one.job.elapsed,
                "restarts": one.job.restarts,
            }
            for one in status.jobs
        ],
        "failed": [_plain_failure(one) for one in status.failed],
        "notes": list(status.notes),
    }


def _plain_failure(failed: FailedJob) -> dict[str, Any]:
    failure = failed.failure
    return {
        "rule": failure.rule,
        "wildcards": failure.wildcards,
        "attempts": failure.attempts,
        "retried": failure.retried,
        "message": failure.message,
        "slurm_job": failure.slurm_job,
        "logs": [{"path": str(tail.path), "tail": tail.lines and list(tail.lines)} for tail in failed.tails],
    }
