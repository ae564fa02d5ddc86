"""`timing.json` beside a manifest: what the work took and where it ran, which no digest covers."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from circuitmill.errors import UpstreamError

TIMING = "timing.json"


def no_constant(text: str) -> None:
    """For json.loads: NaN and infinities are no data.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} in a file of figures")


def read_timing(folder: Path) -> dict[str, Any]:
    """What a stage took and where it ran, from `timing.json`; empty if there is none.

    Earlier versions noted time and memory alone.

    Raises:
        UpstreamError: the file is there but unreadable.
    """
    path = folder / TIMING
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(), parse_constant=no_constant)
        return {
            "wall_seconds": float(raw["wall_seconds"]),
            "peak_memory_bytes": int(raw["peak_memory_bytes"]),
            "cpu_seconds": float(raw.get("cpu_seconds", 0)),
            "device": str(raw.get("device", "")),
            "ranks": int(raw.get("ranks", 1)),
            "continued": bool(raw.get("continued", False)),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UpstreamError(
            "wall_seconds and peak_memory_bytes, two numbers",
            found=f"{type(error).__name__}: {error}",
            where=path,
            fix=f"delete {path}: nothing but these figures is lost",
        ) from error


def cpu_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def computed_on() -> dict[str, Any]:
    """Device and number of ranks of this process. Torch is asked where it is loaded: no GPU without it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {"device": "cpu", "ranks": 1}
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        # a GPU that was not used has no context
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
        "ranks": torch.distributed.get_world_size() if together else 1,
    }
