"""Which calls of snakemake worked on a run: what `circuitmill status`, `cancel` and `resume` start from."""

import fcntl
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = "logs/controllers.jsonl"
"""Below the run's folder."""


@dataclass(frozen=True)
class Controller:
    """One call of snakemake that started jobs."""

    pid: int
    host: str
    started: str
    """ISO 8601, UTC."""
    log: str
    """Snakemake's own log."""
    argv: list[str]
    """The command."""
    folder: str
    """In which it runs."""


def record(run: Path, log: str) -> None:
    """Add this process to the controllers of a run.

    Args:
        run: Its folder, results/<run>.
        log: Snakemake's own log.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    own = Controller(os.getpid(), socket.gethostname(), now, log, list(sys.argv), str(Path.cwd()))
    path = run / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        # a line that a crash left unfinished would spoil this one
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(own)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
