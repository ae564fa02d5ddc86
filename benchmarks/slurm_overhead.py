"""What does a job of a shard cost besides its work: single jobs, arrays, jobs of several shards? JSON lines.

    tests/slurm/cluster start && python -m benchmarks.slurm_overhead [--shards 100]

`snakemake cache` through Slurm in a copy of the workflow whose stages do nothing but leave their manifests; the stages
before are there. On one machine with virtual nodes, which should have nothing else to do:

    wall_s        of the call of snakemake, per shard
    cpu_s         of all processes of the machine meanwhile, per shard
    submit_s      from the first submission to the last, per shard
    calls         of sbatch
    failed        jobs, which were started again
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.dag_scale import REPOSITORY, copy_workflow

FAKE = REPOSITORY / "tests/workflow/fake_cli.py"
WAYS = {"single": ("slurm", 1), "array": ("slurm-array", 1), "ten_shards": ("slurm", 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            row = {"benchmark": "slurm_overhead", "way": way, "shards": arguments.shards}
            print(json.dumps(row | measured(Path(folder), way, arguments.shards)), flush=True)


def measured(folder: Path, way: str, shards: int) -> dict[str, float]:
    """One call of snakemake."""
    profile, per_job = WAYS[way]
    copy_workflow(
        folder, f"scheduler: slurm\npartition: all\nmax_mem_mb: 1900\nmax_runtime: 60\nshards_per_job: {per_job}\n"
    )
    shutil.copytree(REPOSITORY / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copy(FAKE, folder / "src/circuitmill/cli.py")
    # all shards at once: one split in a run of so many, less the one that is held out
    config = ["--config", "run=tiny", f"set=cache.train_shards={shards - 1}"]
    call(folder, "calibrate", "--cores", "2", *config)
    before, start = busy_seconds(), time.monotonic()
    quick = ["--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1"]
    rules = ["cache_shard", *(["cache_shards"] if per_job > 1 else [])]
    said = call(folder, "cache", "--until", *rules, "--profile", f"profiles/{profile}", *quick, *config)
    wall, busy = time.monotonic() - start, busy_seconds() - before
    times = [float(stamp) for stamp in re.findall(r"^submitted at ([\d.]+)$", said, re.MULTILINE)]
    return {
        "wall_s": round(wall / shards, 2),
        "cpu_s": round(busy / shards, 2),
        "submit_s": round((times[-1] - times[0]) / shards, 3) if times else 0.0,
        "calls": len(times),
        "failed": said.count("Error in rule"),
    }


def call(folder: Path, *arguments: str) -> str:
    """Run snakemake; what it said, and the time of every call of sbatch."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    sbatch = shutil.which("sbatch")
    noted = programs / "sbatch.times"
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "submitted at $(date +%s.%N)" >> {noted}\nexec {sbatch} "$@"\n')
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PATH": path}
    command = [sys.executable, "-m", "snakemake", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return done.stderr + (noted.read_text() if noted.exists() else "")


def busy_seconds() -> float:
    """Processor time that this machine has spent on anything."""
    fields = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
