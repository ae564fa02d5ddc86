"""What the jobs of a run used, against what they had asked for: by stage and by rule, from what is on disk.

Two sources say it, and either may be missing: Snakemake's benchmark file of a job, and the `timing.json` that the stage
left beside its manifest. The first has the whole job with all its processes, from looks now and then; the second has
one process without its start, but to its highest point. Of times the first is taken, of memory and CPU time the larger.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuitmill.pipeline import STAGES
from circuitmill.stores.benchmarks import JobRecord, Requested
from circuitmill.stores.manifest import Manifest

OWN_BYTES = 350_000_000
"""Memory of Snakemake itself in a job on a cluster, which its benchmark leaves out."""
LEAST_MB = 1000
"""No job on a cluster is told to ask for less memory."""
LEAST_MINUTES = 10
"""Nor for less time."""
CPU_SECONDS = 60
"""From how long a job on its use of CPUs says anything."""

_ORDER = {stage.name: place for place, stage in enumerate(STAGES)}
_UNITS = {stage.name: stage.unit for stage in STAGES}


@dataclass(frozen=True)
class Job:
    """One job of a stage."""

    place: str
    """Folder of what it made, below the run's."""
    stage: str
    rule: str
    benchmarked: bool
    """Whether Snakemake's benchmark file is there."""
    seconds: float | None
    """On the clock; None if nothing says so, as the next two."""
    cpu_seconds: float | None
    peak_bytes: int | None
    requested: Requested | None
    gpus: int | None
    """That it had, whether it used them or not."""
    seen: bool = True
    """False if `cpu_seconds` and `peak_bytes` are those of one of several ranks."""
    continued: bool = False
    """Whether an earlier attempt had begun it, whose time is not counted."""


@dataclass(frozen=True)
class Usage:
    """Jobs of a stage or of a rule together."""

    name: str
    jobs: tuple[Job, ...]
    bytes: int = 0
    """Of the data files that the manifests list."""

    @property
    def seconds(self) -> float | None:
        """Of all jobs one after the other; None if of no job it is known."""
        return _sum(job.seconds for job in self.jobs)

    @property
    def cpu_seconds(self) -> float | None:
        """The same of their processes."""
        return _sum(job.cpu_seconds for job in self.jobs)

    @property
    def gpu_seconds(self) -> float | None:
        """GPUs that jobs had, times their time; None if of some job it is not known."""
        found = [_product(job.gpus, job.seconds) for job in self.jobs]
        return None if None in found else _sum(found)

    @property
    def longest(self) -> Job | None:
        """The job that took longest."""
        return max((job for job in self.jobs if job.seconds is not None), key=_seconds, default=None)

    @property
    def largest(self) -> Job | None:
        """The job that held most memory."""
        return max((job for job in self.jobs if job.peak_bytes is not None), key=_peak, default=None)


@dataclass(frozen=True)
class Suggestion:
    """A request of a rule that is far from what its jobs used."""

    rule: str
    resource: str
    """As the site file names it: mem_mb, runtime (minutes) or cpus."""
    asked: int
    used: float
    """By the job that used most."""
    jobs: int
    """That were looked at."""
    enough: int
    """What would do."""

    @property
    def low(self) -> bool:
        """Whether too little is asked for, rather than too much."""
        return self.enough > self.asked


@dataclass(frozen=True)
class Prediction:
    """What a plan says before anything is started, and what it came to."""

    what: str
    predicted: int
    """Bytes, as the next."""
    used: int


@dataclass(frozen=True)
class RunUsage:
    """All that is known of what a run, or a part of it, took."""

    run: str
    stages: tuple[Usage, ...]
    rules: tuple[Usage, ...]
    predictions: tuple[Prediction, ...] = ()
    benchmarks: bool = True
    """Whether there was a folder of benchmark files to look into."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Of all stages."""
        return tuple(job for stage in self.stages for job in stage.jobs)

    @property
    def suggestions(self) -> list[Suggestion]:
        """Of all rules."""
        return suggestions(self.rules)


def _seconds(job: Job) -> float:
    return job.seconds or 0.0


def _peak(job: Job) -> int:
    return job.peak_bytes or 0


def _sum(values: Iterable[float | int | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) if known else None


def _product(one: int | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def jobs_of(run: Path, manifests: Iterable[Manifest], records: Iterable[JobRecord]) -> list[Job]:
    """The jobs that made some folders, in the order of the pipeline.

    A benchmark file without one of the folders is left over from another configuration, and says nothing. One of less
    time than the stage noted itself is of an earlier job: the stage was run by hand since.

    Args:
        run: Folder of the run.
        manifests: Of those stages and units.
        records: All that there are of the run.
    """
    at = {_place(run, manifest): manifest for manifest in manifests}
    open_, jobs = dict(at), []
    # a job of one unit before those of several, whose names are shorter
    for record in sorted(records, key=lambda record: len(record.place), reverse=True):
        exact = record.place in at
        made = {
            place: one for place, one in open_.items() if place == record.place or (not exact and _among(place, record))
        }
        if made and record.seconds + 1 >= sum(one.wall_seconds for one in made.values()):
            jobs.append(_benchmarked(record, list(made.values())))
            open_ = {place: one for place, one in open_.items() if place not in made}
    jobs += [_unbenchmarked(place, manifest) for place, manifest in open_.items()]
    return sorted(jobs, key=lambda job: (_ORDER[job.stage], job.place))


def _place(run: Path, manifest: Manifest) -> str:
    folder, run = manifest.folder.resolve(), run.resolve()
    return folder.relative_to(run).as_posix() if folder.is_relative_to(run) else folder.as_posix()


def _among(place: str, record: JobRecord) -> bool:
    """Whether a unit is one of several that a job made: beside its name, which is what theirs begin with."""
    return "/" in record.place and place.startswith(record.place) and "/" not in place.removeprefix(record.place)


def _benchmarked(record: JobRecord, made: Sequence[Manifest]) -> Job:
    peak = max(one.peak_memory_bytes for one in made)
    cpu = sum(one.cpu_seconds for one in made)
    asked = record.requested
    return Job(
        place=record.place,
        stage=record.stage,
        rule=record.rule,
        benchmarked=True,
        seconds=record.seconds,
        cpu_seconds=max(record.cpu_seconds or 0.0, cpu) or None,
        peak_bytes=max(record.peak_bytes or 0, peak) or None,
        requested=asked,
        gpus=_gpus(made[0]) if asked is None else asked.gpus,
        seen=record.seen,
        continued=any(one.continued for one in made),
    )


def _unbenchmarked(place: str, made: Manifest) -> Job:
    return Job(
        place=place,
        stage=made.stage,
        rule=f"run_{made.stage}" if made.unit is None else f"{made.stage}_{_UNITS[made.stage]}",
        benchmarked=False,
        seconds=made.wall_seconds or None,
        cpu_seconds=made.cpu_seconds or None,
        peak_bytes=made.peak_memory_bytes or None,
        requested=None,
        gpus=_gpus(made),
        seen=made.ranks == 1,
        continued=made.continued,
    )


def _gpus(made: Manifest) -> int | None:
    """By what the stage noted of its device: a GPU for each rank."""
    if not made.device:
        return None
    return 0 if made.device == "cpu" else made.ranks


def by_stage(jobs: Iterable[Job], manifests: Iterable[Manifest]) -> list[Usage]:
    """The stages, in the order of the pipeline."""
    jobs, sizes = list(jobs), dict.fromkeys(_ORDER, 0)
    for manifest in manifests:
        sizes[manifest.stage] += sum(entry["bytes"] for entry in manifest.files.values())
    return _grouped({name: [job for job in jobs if job.stage == name] for name in _ORDER}, sizes)


def by_rule(jobs: Iterable[Job]) -> list[Usage]:
    """The rules, in the order of the pipeline."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.rule, []).append(job)
    return _grouped(groups, {})


def _grouped(groups: dict[str, list[Job]], sizes: dict[str, int]) -> list[Usage]:
    return [Usage(name, tuple(jobs), sizes.get(name, 0)) for name, jobs in groups.items() if jobs]


def suggestions(rules: Iterable[Usage]) -> list[Suggestion]:
    """Requests that are far too high, or so low that the next job may not end.

    Memory that was asked for is far too high beyond twice what would do (one and a half times what was used, and
    Snakemake's own), a time limit beyond four times (twice what was used), CPUs beyond twice those that were busy; and
    too low where more than nine tenths of it were used.
    """
    return [found for rule in rules for found in (_memory(rule), _runtime(rule), _cpus(rule)) if found is not None]


def _measured(rule: Usage) -> list[tuple[Job, Requested]]:
    return [(job, job.requested) for job in rule.jobs if job.requested is not None]


def _memory(rule: Usage) -> Suggestion | None:
    found = [
        (job.peak_bytes, asked.memory_bytes)
        for job, asked in _measured(rule)
        if job.seen and job.peak_bytes is not None and asked.memory_bytes is not None
    ]
    if not found:
        return None
    used, asked = (max(values) for values in zip(*found, strict=True))
    enough = max(LEAST_MB, 100 * math.ceil((1.5 * used + OWN_BYTES) / 100_000_000))
    return _far(rule.name, "mem_mb", asked // 1_000_000, used / 1e6, len(found), enough, factor=2)


def _runtime(rule: Usage) -> Suggestion | None:
    found = [
        (job.seconds, asked.seconds)
        for job, asked in _measured(rule)
        if job.seconds is not None and asked.seconds is not None
    ]
    if not found:
        return None
    used, asked = (max(values) for values in zip(*found, strict=True))
    enough = max(LEAST_MINUTES, 5 * math.ceil(2 * used / 300))
    return _far(rule.name, "runtime", int(asked) // 60, used / 60, len(found), enough, factor=4)


def _cpus(rule: Usage) -> Suggestion | None:
    found = [
        (job.cpu_seconds / job.seconds, asked.cpus)
        for job, asked in _measured(rule)
        if job.seen and job.cpu_seconds is not None and _seconds(job) >= CPU_SECONDS and job.seconds and asked.cpus
    ]
    if not found:
        return None
    used, asked = (max(values) for values in zip(*found, strict=True))
    enough = max(1, math.ceil(used))
    # a job that keeps all its CPUs busy need not be in want of more
    return _far(rule.name, "cpus", int(asked), used, len(found), enough, factor=2) if enough < asked else None


def _far(
    rule: str, resource: str, asked: int, used: float, jobs: int, enough: int, *, factor: int
) -> Suggestion | None:
    if used > 0.9 * asked or asked > factor * enough:
        return Suggestion(rule, resource, asked, used, jobs, enough)
    return None
