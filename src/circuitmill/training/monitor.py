"""Where the numbers of a training go: files with one JSON object per row (stores/metrics.py).

They only grow. A training that resumes from a checkpoint first drops the rows that came after it, so that every step
appears once, and metrics.jsonl of an interrupted training is that of an unbroken one.
"""

import json
import math
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from circuitmill.stores.metrics import THROUGHPUT, Row, parted, whole_rows


@runtime_checkable
class Sink(Protocol):
    """Takes rows."""

    def log(self, row: Row) -> None:
        """Take one row; `step` and `tokens` are among its keys."""

    def close(self) -> None:
        """No further rows follow."""


class MetricsFile:
    """Appends rows to two files, what was measured to the second; a number that is not finite becomes null."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._files = []
        for each in (path, path.with_name(THROUGHPUT)):
            kept = [line for line, row in whole_rows(each) if row["step"] <= resume_step]
            temporary = each.with_name(f".{each.name}.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(each)
            self._files.append(each.open("a", encoding="utf-8"))

    def log(self, row: Row) -> None:
        """Append a row and hand it to the operating system."""
        for file, part in zip(self._files, parted(row), strict=True):
            file.write(json.dumps(_finite(part), allow_nan=False) + "\n")
            file.flush()

    def close(self) -> None:
        """Wait until the disk has it."""
        for file in self._files:
            os.fsync(file.fileno())
            file.close()


def _finite(value: object) -> object:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
