"""How long does Snakemake think about many shards, and in how much memory? JSON lines.

    python -m benchmarks.dag_scale [--shards 1000 10000] [--per-job 1 10 100]

A dry run of `cache` of the embedded model, in a copy of the workflow, with so many shards.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--per-job", type=int, nargs="*", default=[1, 10, 100])
    arguments = parser.parse_args()
    for shards in arguments.shards:
        for per_job in arguments.per_job:
            with tempfile.TemporaryDirectory() as folder:
                copy_workflow(Path(folder), f"scheduler: slurm\nshards_per_job: {per_job}\n")
                row = {"benchmark": "dag_scale", "shards": shards, "per_job": per_job}
                print(json.dumps(row | dry_run(Path(folder), shards)), flush=True)


def copy_workflow(folder: Path, site: str) -> None:
    """A folder like a checkout, with this site file."""
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    (folder / "profiles/slurm/site.yaml").write_text(site)


def dry_run(folder: Path, shards: int) -> dict[str, float]:
    """Seconds of wall and processor, memory and the number of jobs."""
    config = ["--config", "run=tiny", f"set=cache.train_shards={shards}"]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-n",
        "--quiet",
        "rules",
        "--profile",
        "profiles/slurm",
        "cache",
        *config,
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=os.environ)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    jobs = next(
        int(line.split()[1]) for line in done.stdout.splitlines() + done.stderr.splitlines() if line[:5] == "total"
    )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # of the largest child so far: rows come in the order of their size
    return {"jobs": jobs, "wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_mb": round(after.ru_maxrss / 1000)}


if __name__ == "__main__":
    main()
