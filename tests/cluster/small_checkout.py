"""A folder that looks like a checkout in which a controller works or worked, and a stand-in for snakemake."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from circuitmill.controllers import FILE

# It says that it is ready, then waits for signals: `quick` ends on SIGINT, `patient` on SIGTERM, `deaf` on neither.
# `jobs` starts a process that writes into the run and ends on SIGTERM, and waits for it after SIGINT.
PROGRAM = """
import signal, subprocess, sys, time
from pathlib import Path
Path("calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if "--unlock" in sys.argv:
    print("cannot unlock"); sys.exit(Path("locked").exists())
if "--rerun-incomplete" in sys.argv:
    sys.exit(9)
mode = sys.argv[1]
child = None
if mode == "jobs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *sys.argv[2:]])
def interrupted(*_):
    if child: child.wait()
    sys.exit(1)
signal.signal(signal.SIGINT, signal.SIG_IGN if mode in ("patient", "deaf") else interrupted)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else signal.SIG_DFL)
Path("ready").touch()
while True: time.sleep(0.05)
"""


def make_checkout(folder: Path) -> Path:
    """A folder with the stand-in and an empty run `tiny`."""
    (folder / "snakemake").write_text(f"#!{sys.executable}\n{PROGRAM}")
    (folder / "snakemake").chmod(0o755)
    (folder / "results/tiny/logs").mkdir(parents=True)
    return folder / "results/tiny"


def record(checkout: Path, argv: list[str], *, pid: int = 4_000_000, log: str = "", **changes: str) -> None:
    """Write a controller down, with its log."""
    (checkout / "controller.log").write_text(log)
    line = {
        "pid": pid,
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(),
        "log": "controller.log",
        "argv": [str(checkout / "snakemake"), *argv],
        "folder": str(checkout),
    }
    with (checkout / "results/tiny" / FILE).open("a") as file:
        file.write(json.dumps(line | changes) + "\n")


def start(checkout: Path, *words: str, log: str = "") -> subprocess.Popen:
    """Start the stand-in as a recorded controller."""
    process = subprocess.Popen([str(checkout / "snakemake"), *words], cwd=checkout, start_new_session=True)
    wait_for(checkout / "ready")
    record(checkout, list(words), pid=process.pid, log=log)
    return process


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def end(*processes: subprocess.Popen) -> None:
    """Kill what tests started, with all that it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
