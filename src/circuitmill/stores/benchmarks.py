"""Snakemake's benchmark files: what each job of the workflow took, and what it had asked for.

`results/<run>/benchmarks/` is laid out as the run's folder is: `cache/shard/train-00000.jsonl` is of the job that made
`cache/shard/train-00000/`, and `cache/shard/train-0000.jsonl` of one that made all shards whose names begin so. A file
has one JSON object per attempt that ended well, in general one. With `benchmark-extended` it also holds rule and
resources; without, what was asked for is not known.

Snakemake looks at memory and CPU time of a job's processes every half second at first and later every half minute: a
job shorter than that has neither, and a peak between two looks is missed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.config.resources import gpus
from circuitmill.errors import StoreError
from circuitmill.pipeline import STAGES
from circuitmill.stores.timing import no_constant

_UNITS = {stage.name: stage.unit for stage in STAGES}
_MIB = 2**20


@dataclass(frozen=True)
class Requested:
    """What a job had asked for; None where it had not."""

    memory_bytes: int | None
    seconds: int | None
    """Time limit."""
    cpus: int | None
    gpus: int
    """Of all nodes."""


@dataclass(frozen=True)
class JobRecord:
    """What Snakemake noted of one job; of its attempts time is added up."""

    place: str
    """Folder of what it made, below the run's: cache/shard/train-00000, main/train."""
    stage: str
    rule: str
    seconds: float
    """On the clock."""
    cpu_seconds: float | None = None
    """Of all its processes; None if it was over before Snakemake looked, as the next three."""
    peak_bytes: int | None = None
    """Most memory that all its processes held together."""
    read_bytes: int | None = None
    written_bytes: int | None = None
    requested: Requested | None = None
    """None if the file does not say."""
    seen: bool = True
    """False if its processes ran in a step of several nodes, where Snakemake does not look."""


def stage_of(place: str) -> str | None:
    """The stage that a folder below a run's belongs to; None if it is no stage's.

    >>> stage_of("cache/shard/train-00000"), stage_of("main/train"), stage_of("main/config/train")
    ('cache', 'train', None)
    """
    first, *rest = place.split("/")
    if first in _UNITS and (not rest or rest[0] == _UNITS[first]):
        return first
    return rest[0] if rest and rest[0] in _UNITS and first != "config" else None


def read_benchmarks(folder: Path) -> list[JobRecord]:
    """All jobs of stages, in the order of their places; of rules that make no stage's files there are none.

    Args:
        folder: results/<run>/benchmarks.

    Raises:
        StoreError: there is no such folder, or a file in it is not Snakemake's.
    """
    if not folder.is_dir():
        raise StoreError(
            "a folder of Snakemake's benchmark files",
            found="another file" if folder.exists() else "no such folder",
            where=folder,
            fix="name results/<run>/benchmarks, or leave it out",
        )
    records = []
    for path in sorted(folder.rglob("*.jsonl")):
        place = path.relative_to(folder).with_suffix("").as_posix()
        stage = stage_of(place)
        rows = [] if stage is None else _rows(path)
        if stage is not None and rows:
            records.append(_record(place, stage, rows))
    return records


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line, parse_constant=no_constant)
            row["s"] = float(row["s"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                "one JSON object with Snakemake's figures of a job per line",
                found=f"{line[:80]!r} ({type(error).__name__})",
                where=f"{path}:{number}",
                fix=f"delete {path}: nothing but these figures is lost",
            ) from error
        rows.append(row)
    return rows


def _record(place: str, stage: str, rows: list[dict[str, Any]]) -> JobRecord:
    last = rows[-1]
    resources = last.get("resources")
    gathered = f"/{_UNITS[stage]}/" not in f"{place}/"
    # ranks on several nodes are started by srun, whose own few megabytes are all that is there to be seen
    seen = resources is None or _whole(resources.get("nodes")) in (None, 1)
    return JobRecord(
        place=place,
        stage=stage,
        rule=last.get("rule_name") or (f"run_{stage}" if gathered else f"{stage}_{_UNITS[stage]}"),
        seconds=sum(row["s"] for row in rows),
        cpu_seconds=_sum(rows, "cpu_time") if seen else None,
        peak_bytes=max(filter(None, (_bytes(row, "max_rss") for row in rows)), default=None) if seen else None,
        read_bytes=_last_bytes(rows, "io_in") if seen else None,
        written_bytes=_last_bytes(rows, "io_out") if seen else None,
        requested=None if resources is None else _requested(resources, last.get("threads")),
        seen=seen,
    )


def _looked_at(row: Mapping[str, Any]) -> bool:
    """Whether there was a process when Snakemake looked; with none it notes zeros, or NA."""
    return isinstance(row.get("max_rss"), int | float) and row["max_rss"] > 0


def _bytes(row: Mapping[str, Any], key: str) -> int | None:
    value = row.get(key)
    return round(value * _MIB) if _looked_at(row) and isinstance(value, int | float) else None


def _last_bytes(rows: list[dict[str, Any]], key: str) -> int | None:
    found = [size for row in rows if (size := _bytes(row, key)) is not None]
    return sum(found) if found else None


def _sum(rows: list[dict[str, Any]], key: str) -> float | None:
    found = [float(row[key]) for row in rows if _looked_at(row) and isinstance(row.get(key), int | float)]
    return sum(found) if found else None


def _requested(resources: Mapping[str, Any], threads: object) -> Requested:
    memory, minutes = _whole(resources.get("mem_mb")), _whole(resources.get("runtime"))
    return Requested(
        memory_bytes=None if memory is None else memory * 1_000_000,
        seconds=None if minutes is None else minutes * 60,
        cpus=_whole(resources.get("cpus_per_task")) or _whole(threads),
        gpus=gpus(resources),
    )


def _whole(value: object) -> int | None:
    """A number; a resource that Snakemake had not settled is a text."""
    return int(value) if isinstance(value, int | float) else None
