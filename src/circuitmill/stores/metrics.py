"""Rows of numbers that a training leaves: those that follow from what is trained, and those of time and memory apart.

| file | key of a row besides `step` |
|---|---|
| metrics.jsonl | every number that another machine would find too |
| throughput.jsonl | those in `MEASURED`; missing if the folder was not made here |
"""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Numbers, lists of one number per layer, and groups of these, by name."""

METRICS = "metrics.jsonl"
THROUGHPUT = "throughput.jsonl"
MEASURED = ("tokens_per_second", "data_wait_share", "peak_memory_bytes", "wire_bytes_per_step")
"""What depends on the machine, the hour and how ranks share the work."""


def read_metrics(path: Path) -> list[Row]:
    """All whole rows of a metrics file, each with what was measured at its step.

    Args:
        path: Of metrics.jsonl.
    """
    measured = {row["step"]: row for _, row in whole_rows(path.with_name(THROUGHPUT))}
    return [row | measured.get(row["step"], {}) for _, row in whole_rows(path)]


def whole_rows(path: Path) -> list[tuple[str, Row]]:
    """Whole lines of a file and what they say; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(line, json.loads(line)) for line in lines if line.endswith("\n")]


def parted(row: Row) -> tuple[Row, Row]:
    """A row without what was measured, and that alone with the step."""
    measured = {key: row[key] for key in ("step", *MEASURED) if key in row}
    return {key: value for key, value in row.items() if key not in MEASURED}, measured
