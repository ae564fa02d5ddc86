"""What a run took, as the same table on the page and in a terminal, and as data."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from circuitmill.stores.usage import Job, RunUsage, Suggestion, Usage
from circuitmill.viz.formatting import Real, count, duration, number, size

UNKNOWN = "–"
HOUR = 3600
_NAMES = 3
"""Stages that a note names before it counts the others."""


@dataclass(frozen=True)
class Cell:
    """What a cell of the table says."""

    text: str
    detail: str = ""
    """Stands smaller below or after it."""
    share: Real | None = None
    """Of what was asked for, for a bar."""


def heads(usage: RunUsage) -> list[str]:
    """Heads of the columns."""
    gpus = ["GPU hours"] if _with_gpus(usage) else []
    return ["Stage", "Jobs", "Wall time", "Longest job", "CPU time", "Peak memory", *gpus, "On disk"]


def rows(usage: RunUsage) -> list[list[Cell]]:
    """A row per stage, and a last one for all of them."""
    total = Usage("Sum", usage.jobs, sum(stage.bytes for stage in usage.stages))
    return [*(_row(stage, usage) for stage in usage.stages), [Cell(cell.text) for cell in _row(total, usage)]]


def _with_gpus(usage: RunUsage) -> bool:
    """Whether a job had any."""
    return any(job.gpus for job in usage.jobs)


def _row(stage: Usage, usage: RunUsage) -> list[Cell]:
    jobs = stage.jobs
    cells = [
        Cell(stage.name),
        Cell(count(len(jobs))),
        Cell(_at_least(stage.seconds, duration, any(job.seconds is None or job.continued for job in jobs))),
        _longest(stage.longest),
        Cell(_at_least(stage.cpu_seconds, duration, any(job.cpu_seconds is None or not job.seen for job in jobs))),
        _largest(stage.largest),
    ]
    if _with_gpus(usage):
        hours = stage.gpu_seconds
        cells.append(Cell(UNKNOWN if hours is None else number(hours / HOUR)))
    return [*cells, Cell(size(stage.bytes))]


def _at_least(value: float | None, words: Any, incomplete: bool) -> str:
    """A sum to which something is missing."""
    if value is None:
        return UNKNOWN
    return f"≥ {words(value)}" if incomplete else words(value)


def _longest(job: Job | None) -> Cell:
    if job is None or job.seconds is None:
        return Cell(UNKNOWN)
    asked = None if job.requested is None else job.requested.seconds
    if not asked:
        return Cell(duration(job.seconds))
    return Cell(duration(job.seconds), f"of {_limit(asked)}", job.seconds / asked)


def _limit(seconds: int) -> str:
    """A time limit, which is whole minutes.

    >>> _limit(1800), _limit(7200), _limit(5400)
    ('30 min', '2 h', '1 h 30 min')
    """
    hours, minutes = divmod(seconds // 60, 60)
    return " ".join(f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min")) if value)


def _largest(job: Job | None) -> Cell:
    if job is None or job.peak_bytes is None:
        return Cell(UNKNOWN)
    said = size(job.peak_bytes) if job.seen else f"≥ {size(job.peak_bytes)}"
    asked = None if job.requested is None else job.requested.memory_bytes
    if not asked:
        return Cell(said)
    return Cell(said, f"of {size(asked)}", job.peak_bytes / asked if job.seen else None)


def notes(usage: RunUsage) -> list[str]:
    """What the table leaves out or takes from elsewhere, a sentence or two each."""
    return list(_notes(usage))


def _notes(usage: RunUsage) -> Iterator[str]:
    jobs = usage.jobs
    other = [job for job in jobs if not job.benchmarked]
    own = (
        "times are what the stages noted themselves, without the start of their programs, and memory is of one process"
    )
    if not usage.benchmarks:
        yield f"There are no benchmark files of this run: {own}. What was asked for is not known."
    elif other:
        yield f"There is no benchmark file of {_jobs(other, usage)}, as after a run by hand: there {own}."
    if unknown := [job for job in jobs if job.seconds is None]:
        yield f"Nothing says what was used by {_jobs(unknown, usage)}: neither a benchmark file nor timing.json."
    if silent := [job for job in jobs if job.benchmarked and job.requested is None]:
        yield (
            f"What was asked for is not in the benchmark files of {_jobs(silent, usage)}: "
            "Snakemake notes it if it is called with --benchmark-extended."
        )
    known = [job for job in jobs if job.seconds is not None]
    if short := [job for job in known if job.cpu_seconds is None or job.peak_bytes is None]:
        yield f"Nothing looked at memory and CPU time of {_jobs(short, usage)} before the end."
    if several := [job for job in jobs if not job.seen]:
        yield f"Memory and CPU time of {_jobs(several, usage)} are those of the first rank alone."
    if continued := [job for job in jobs if job.continued]:
        yield f"An earlier attempt had begun {_jobs(continued, usage)}; its time is not counted."


def _jobs(jobs: Sequence[Job], usage: RunUsage) -> str:
    """Which jobs: their stages, and how many they are of several."""
    said = []
    for stage in usage.stages:
        own = sum(job in jobs for job in stage.jobs)
        if own:
            part = "" if own == len(stage.jobs) else f" ({own} of {len(stage.jobs)} jobs)"
            said.append(stage.name + part)
    more = len(said) - _NAMES
    if more > 1:
        said = [*said[:_NAMES], f"{more} other stages"]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def suggestion_lines(found: Sequence[Suggestion]) -> list[str]:
    """A line per rule; what would do is written as the site file has it.

    >>> suggestion_lines([Suggestion("cache_shard", "mem_mb", 4000, 909.6, 8, 1800)])
    ['cache_shard asks 4000 MB, used at most 910 MB in 8 jobs. Would do: {mem_mb: 1800}']
    """
    lines = []
    for rule, group in groupby(found, key=lambda one: one.rule):
        own = list(group)
        said = "; ".join(_asked_and_used(one) for one in own)
        jobs = max(one.jobs for one in own)
        verdict = "Safer" if any(one.low for one in own) else "Would do"
        enough = ", ".join(f"{one.resource}: {one.enough}" for one in own)
        lines.append(f"{rule} {said} in {jobs} {'job' if jobs == 1 else 'jobs'}. {verdict}: {{{enough}}}")
    return lines


def _asked_and_used(one: Suggestion) -> str:
    if one.resource == "mem_mb":
        return f"asks {one.asked} MB, used at most {one.used:.0f} MB"
    if one.resource == "runtime":
        return f"asks {one.asked} min, took at most {number(one.used, 2)} min"
    return f"asks {one.asked} CPUs, kept at most {number(one.used, 2)} busy"


def document(usage: RunUsage) -> dict[str, Any]:
    """Everything as plain data; null where it is not known."""
    return {
        "run": usage.run,
        "wall_seconds": Usage("", usage.jobs).seconds,
        "benchmarks": usage.benchmarks,
        "stages": [_plain(stage) | {"bytes": stage.bytes} for stage in usage.stages],
        "rules": [_plain(rule) for rule in usage.rules],
        "suggestions": [asdict(one) for one in usage.suggestions],
        "predictions": [asdict(one) for one in usage.predictions],
        "notes": notes(usage),
    }


def _plain(group: Usage) -> dict[str, Any]:
    longest, largest = group.longest, group.largest
    time = None if longest is None else longest.requested
    memory = None if largest is None else largest.requested
    return {
        "name": group.name,
        "jobs": len(group.jobs),
        "benchmarked": sum(job.benchmarked for job in group.jobs),
        "wall_seconds": group.seconds,
        "longest_seconds": None if longest is None else longest.seconds,
        "longest_requested_seconds": None if time is None else time.seconds,
        "cpu_seconds": group.cpu_seconds,
        "peak_bytes": None if largest is None else largest.peak_bytes,
        "peak_requested_bytes": None if memory is None else memory.memory_bytes,
        "gpus": max((job.gpus for job in group.jobs if job.gpus is not None), default=None),
        "gpu_hours": None if group.gpu_seconds is None else group.gpu_seconds / HOUR,
    }


def page_data(usage: RunUsage) -> dict[str, Any]:
    """What the page's script draws, as texts."""
    return {
        "heads": heads(usage),
        "rows": [[asdict(cell) for cell in row] for row in rows(usage)],
        "notes": notes(usage),
        "suggestions": suggestion_lines(usage.suggestions),
        "predictions": [[one.what, size(one.predicted), size(one.used)] for one in usage.predictions],
    }


def rendered(usage: RunUsage) -> Group:
    """Tables and lines for a terminal."""
    table = _table(f"What {usage.run} took", *heads(usage))
    *stages, total = rows(usage)
    for row in stages:
        table.add_row(*(f"{cell.text} {cell.detail}".rstrip() for cell in row))
    table.add_section()
    table.add_row(*(cell.text for cell in total))
    parts: list[Any] = [table]
    if usage.predictions:
        expected = _table("Planned and used", "", "planned", "used")
        for one in usage.predictions:
            expected.add_row(one.what, size(one.predicted), size(one.used))
        parts.append(expected)
    parts += [Text(f"note: {note}") for note in notes(usage)]
    return Group(*parts, *(Text(line) for line in suggestion_lines(usage.suggestions)))


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
