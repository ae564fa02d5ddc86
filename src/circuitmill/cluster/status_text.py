"""A status as text."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from circuitmill.cluster.status import FailedJob, QueuedJob, RunStatus, Tail

_NAMED = 3
"""Jobs of a group that are named."""


def rendered(status: RunStatus) -> Group:
    """The controller, tables of stages and Slurm jobs, failed jobs with the ends of their logs, and notes."""
    parts: list[Any] = [Text(_head(status))]
    if status.stages:
        parts.append(_stages(status))
    if status.jobs:
        parts.append(_jobs(status.jobs))
    elif status.jobs is not None:
        parts.append(Text("No job of the run is in Slurm's queue.\n"))
    parts += [Text(line) for failed in status.failed for line in _failure(failed)]
    parts += [Text(f"note: {note}") for note in status.notes]
    return Group(*parts)


def _head(status: RunStatus) -> str:
    controller, name = status.controller, status.folder.name
    if controller is None:
        return f"{name}: no controller is recorded\n"
    who = f"controller {controller.pid} on {controller.host}, started {controller.started:%Y-%m-%d %H:%M:%S} UTC"
    again = f"`circuitmill resume {status.folder}`"
    match status.state:
        case "running":
            says = "runs"
        case "ended":
            says = "ended" + (f"; {again} runs it again" if status.failed else "")
        case "gone":
            says = f"is gone without closing words, so it was killed; {again} goes on"
        case _:
            says = "was started on another machine, where this one cannot look"
    return f"{name}: {who}, {says}\n"


def _stages(status: RunStatus) -> Table:
    table = _table("Manifests", "stage", "variant", "units", "stage done")
    for stage in status.stages:
        units = f"{stage.units_there} of {stage.units} {stage.unit}s" if stage.unit and stage.units else ""
        table.add_row(stage.stage, stage.variant, units, "yes" if stage.there else "no")
    return table


def _jobs(jobs: tuple[QueuedJob, ...]) -> Table:
    table = _table("Slurm jobs", "rule", "state", "jobs", "requeued", "reason", "nodes", "which")
    groups: dict[tuple[str, str, str], list[QueuedJob]] = {}
    for one in jobs:
        groups.setdefault((one.rule or "(unknown)", one.job.state, one.job.reason), []).append(one)
    for (rule, state, reason), members in sorted(groups.items()):
        nodes = Counter(one.job.nodes for one in members if one.job.nodes)
        requeued = sum(one.job.restarts > 0 for one in members)
        table.add_row(
            rule,
            state,
            str(len(members)),
            str(requeued) if requeued else "",
            reason,
            " ".join(sorted(nodes)),
            _named([f"{one.job.id} {one.wildcards}".strip() for one in members]),
        )
    return table


def _named(words: list[str]) -> str:
    more = len(words) - _NAMED
    return ", ".join(words[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _failure(failed: FailedJob) -> Iterator[str]:
    failure = failed.failure
    which = ", ".join(f"{name}={value}" for name, value in failure.wildcards.items())
    slurm = f", Slurm job {failure.slurm_job}" if failure.slurm_job else ""
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    yield (
        f"{failure.rule}{f' ({which})' if which else ''} failed {times}{slurm}"
        + (", and was started again" if failure.retried else "")
    )
    if failure.message:
        yield f"  {failure.message}"
    for tail in failed.tails:
        yield from _tail(tail)
    yield ""


def _tail(tail: Tail) -> Iterator[str]:
    if not tail.lines:
        yield f"  {tail.path}: {'no such file' if tail.lines is None else 'empty'}"
        return
    yield f"  the end of {tail.path}:"
    yield from (f"    {line}" for line in tail.lines)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("jobs", "requeued") else "left", overflow="fold")
    return table
