"""Where the numbers of a training go: a file with one JSON object per row.

The file only grows. A training that resumes from a checkpoint first drops the rows that came after it, so
that every step appears once, and the file of an interrupted training has the same steps as that of an
unbroken one.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Row = dict[str, Any]
"""Numbers, lists of one number per layer, and groups of these, by name."""


@runtime_checkable
class Sink(Protocol):
    """Takes rows."""

    def log(self, row: Row) -> None:
        """Take one row; `step` and `tokens` are among its keys."""

    def close(self) -> None:
        """No further rows follow."""


class MetricsFile:
    """Appends rows to a file; a number that is not finite becomes null."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        kept = [line for line, row in _rows(path) if row["step"] <= resume_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        """Append a row and hand it to the operating system."""
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """All whole rows of a metrics file."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> list[tuple[str, dict]]:
    """Whole lines and what they say; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(line, json.loads(line)) for line in lines if line.endswith("\n")]


def _finite(value: object) -> object:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
