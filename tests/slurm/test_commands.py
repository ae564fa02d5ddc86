"""`circuitmill status`, `cancel` and `resume` on a real Slurm, with a workflow whose jobs wait for a file."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.slurm.conftest import Slurm

from circuitmill.cli import main
from circuitmill.cluster.controllers import read_record
from circuitmill.controllers import FILE

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-m", "circuitmill"]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
SHARD = "rule_cache_shard_wildcards_"
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

# The names are those of run `tiny`, so that its configuration says how many manifests there should be. As long as there
# is no file `go`, the shard waits, the prompt fails and the report waits in Slurm's queue.
WORKFLOW = """
from pathlib import Path
from circuitmill.controllers import record
R = "results/" + config["run"]
onstart:
    record(Path(R), log[0])
rule all:
    input:
        R + "/cache/shard/train-00000/manifest.json",
        R + "/main/attribute/prompt/two_hop-00/manifest.json",
        R + "/main/report/manifest.json",
    localrule: True
rule shards:
    input: R + "/cache/shard/train-00000/manifest.json"
    localrule: True
rule cache_shard:
    output: R + "/cache/shard/{shard}/manifest.json"
    shell: "until [ -e go ]; do sleep .1; done; echo {wildcards.shard} > {output}"
rule attribute_prompt:
    output: R + "/{variant}/attribute/prompt/{prompt}/manifest.json"
    log: R + "/logs/{variant}/attribute/prompt/{prompt}.log"
    shell: "seq 30 > {log}; test -e go; touch {output}"
rule run_report:
    output: R + "/main/report/manifest.json"
    resources: slurm_extra=lambda wildcards: "" if Path("go").exists() else "--begin=now+3600"
    shell: "touch {output}"
"""

PROFILE = """
executor: slurm
jobs: 20
latency-wait: 5
keep-going: true
slurm-status-command: squeue
slurm-init-seconds-before-status-checks: 1
slurm-jobname-prefix: circuitmill
default-resources: {slurm_partition: cpu, mem_mb: 500, runtime: 5}
"""


def circuitmill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: it starts many times here, and takes a second each."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def status(folder: Path, run: str) -> dict[str, Any]:
    done = circuitmill(folder, "status", f"results/{run}", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def active(slurm: Slurm, folder: Path) -> dict[str, str]:
    """Job -> name, of the jobs that were submitted from a folder and are not over."""
    return {job.id: job.name for job in slurm.jobs() if job.folder == str(folder) and job.state in ACTIVE}


def start(folder: Path, run: str, target: str) -> subprocess.Popen:
    command = [*SNAKEMAKE, "--profile", "profile", target, "--config", f"run={run}"]
    with (folder / f"{run}.out").open("w") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


@pytest.fixture
def checkout(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A folder with the workflow; what runs from it is ended."""
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.yaml").write_text(PROFILE)
    yield tmp_path
    for record in tmp_path.glob(f"results/*/{FILE}"):
        for controller in read_record(record.parents[1]).controllers:
            if Path(f"/proc/{controller.pid}").exists():
                os.kill(controller.pid, signal.SIGKILL)
    slurm.cancel(list({job.split("_")[0] for job in active(slurm, tmp_path)}))


def record_of(folder: Path, run: str, run_id: str) -> None:
    """A record of a controller that is dead."""
    logs = folder / "results" / run / "logs"
    logs.mkdir(parents=True)
    (folder / f"{run}.log").write_text(f"SLURM run ID: {run_id}\n")
    line = {"pid": 4_000_000, "host": os.uname().nodename, "started": "2026-01-01T00:00:00+00:00", "log": f"{run}.log"}
    command = ["snakemake", "--config", f"run={run}"]
    (logs / "controllers.jsonl").write_text(json.dumps({**line, "argv": command, "folder": str(folder)}) + "\n")


def test_cancel_ends_the_jobs_of_this_run_and_checkout_alone(slurm: Slurm, tmp_path: Path):
    mine, neighbour = tmp_path / "mine", tmp_path / "neighbour"
    for folder in (mine, neighbour):
        folder.mkdir()
    record_of(mine, "tiny", "circuitmill_1")
    record_of(mine, "demo", "circuitmill_12")
    named, others = ("--job-name=circuitmill_1", f"--comment={SHARD}a"), "--job-name=circuitmill_12"
    wait = "sleep 600"
    array = slurm.submit(wait, *named, "--array=1-3%2", folder=mine)
    requeued = slurm.submit(wait, *named, "--partition=preempt", folder=mine)
    kept = [slurm.submit(wait, others, folder=mine), slurm.submit(wait, *named, folder=neighbour)]
    for job in (f"{array}_1", f"{array}_2", requeued, *kept):
        slurm.wait_for_state(job, "RUNNING")
    slurm.run("scontrol", "requeue", requeued)
    slurm.wait_for_state(requeued, "PENDING")

    jobs = {job["id"]: job for job in status(mine, "tiny")["jobs"]}
    assert set(jobs) == {f"{array}_1", f"{array}_2", f"{array}_3", requeued}
    assert {jobs[f"{array}_{k}"]["rule"] for k in (1, 2, 3)} == {"cache_shard"}
    assert {jobs[f"{array}_{k}"]["wildcards"] for k in (1, 2, 3)} == {""}  # the comment is of the first task
    assert jobs[f"{array}_3"]["reason"] == "JobArrayTaskLimit"
    assert (jobs[requeued]["restarts"], jobs[requeued]["wildcards"]) == (1, "a")

    done = circuitmill(mine, "cancel", "results/tiny")
    assert done.returncode == 0, done.stderr
    assert "cancelling 4 Slurm jobs" in done.stdout and "no Slurm job of the run is left (4 cancelled)" in done.stdout
    assert set(active(slurm, mine)) | set(active(slurm, neighbour)) == set(kept)
    assert {slurm.job(job).state for job in kept} == {"RUNNING"}
    again = circuitmill(mine, "cancel", "results/tiny")
    assert again.returncode == 0 and "cancelling" not in again.stdout
    slurm.cancel(kept)


def test_cancel_says_what_is_left_when_the_time_is_up(slurm: Slurm, tmp_path: Path):
    record_of(tmp_path, "tiny", "circuitmill_stubborn")
    stubborn = "trap '' TERM; touch trapped; while true; do sleep 1; done"  # until Slurm kills it
    job = slurm.submit(stubborn, "--job-name=circuitmill_stubborn", folder=tmp_path)
    slurm.wait_for(lambda: (tmp_path / "trapped").exists(), what="job that ignores SIGTERM")
    done = circuitmill(tmp_path, "cancel", "results/tiny", "--timeout", "2")
    assert done.returncode == 1
    assert f"found {job} COMPLETING" in done.stderr and "--timeout" in done.stderr
    done = circuitmill(tmp_path, "cancel", "results/tiny")
    assert done.returncode == 0 and slurm.job(job).state == "CANCELLED"


def test_a_run_whose_controller_is_killed(slurm: Slurm, checkout: Path):
    other = slurm.submit("sleep 600", "--job-name=circuitmill_other", "--partition=all", folder=checkout)
    controller = start(checkout, "tiny", "all")

    output = checkout / "tiny.out"
    slurm.wait_for(lambda: "Error in rule attribute_prompt" in output.read_text(), timeout=100, what="failed prompt")
    shard = next(
        job.id for job in slurm.jobs() if job.comment == f"{SHARD}train-00000" and job.id in active(slurm, checkout)
    )
    slurm.wait_for_state(shard, "RUNNING")
    check_running(checkout, controller.pid)

    refused = circuitmill(checkout, "resume", "results/tiny")  # while it lives
    assert refused.returncode == 1 and f"already running, pid {controller.pid}" in refused.stderr
    controller.kill()
    controller.wait()
    orphans = {job["id"] for job in status(checkout, "tiny")["jobs"]}
    assert len(orphans) == 2
    text = circuitmill(checkout, "status", "results/tiny").stdout
    assert "killed" in text and "circuitmill resume" in text

    plan = circuitmill(checkout, "resume", "results/tiny", "--dry-run", "--", "--retries", "1").stdout.splitlines()
    assert {line.split()[1] for line in plan if line.startswith("scancel")} == orphans
    assert plan[-2].split()[:4] == [*SNAKEMAKE, "--unlock"]
    assert plan[-1].endswith("--rerun-incomplete --profile profile all --config run=tiny --retries 1")
    assert set(active(slurm, checkout)) == orphans | {other}  # nothing was done yet

    resuming = subprocess.Popen(
        [*PROGRAM, "resume", "results/tiny"], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # the gate stays shut until the orphans are gone, so that what is there was made by the second controller
    slurm.wait_for(lambda: not orphans & set(active(slurm, checkout)), what="end of the orphans")
    assert not list(checkout.glob("results/tiny/cache/shard/*/manifest.json"))
    (checkout / "go").touch()
    said, _ = resuming.communicate(timeout=150)
    assert resuming.returncode == 0, said
    assert "cancelling 2 Slurm jobs" in said and "4 of 4 steps (100%) done" in said
    first, second = read_record(checkout / "results/tiny").controllers
    assert (first.pid, second.pid) == (controller.pid, resuming.pid)
    now = status(checkout, "tiny")
    assert (now["controller"]["state"], now["jobs"], now["failed"]) == ("ended", [], [])
    assert slurm.job(other).state == "RUNNING"


def check_running(checkout: Path, pid: int) -> None:
    """Status of a run a shard of which runs, while a prompt has failed and the report is pending."""
    now = status(checkout, "tiny")
    assert (now["controller"]["state"], now["controller"]["pid"]) == ("running", pid)
    jobs = {(job["rule"], job["wildcards"]): job for job in now["jobs"]}
    assert set(jobs) == {("cache_shard", "train-00000"), ("run_report", "")}
    assert jobs["run_report", ""]["reason"] == "BeginTime"
    assert jobs["cache_shard", "train-00000"]["nodes"].startswith("n")
    (failed,) = now["failed"]
    assert (failed["rule"], failed["wildcards"]) == ("attribute_prompt", {"variant": "main", "prompt": "two_hop-00"})
    own, of_slurm = failed["logs"]
    assert own["tail"] == [str(k) for k in range(11, 31)]
    assert of_slurm["path"].endswith(f"{failed['slurm_job']}.log") and len(of_slurm["tail"]) == 20
    stages = {stage["stage"]: stage for stage in now["stages"]}
    assert (stages["cache"]["units_there"], stages["cache"]["units"], stages["report"]["there"]) == (0, 3, False)
    text = circuitmill(checkout, "status", "results/tiny").stdout
    assert "\x1b" not in text
    for part in (
        "0 of 3 shards",
        "RUNNING",
        "BeginTime",
        "attribute_prompt (variant=main, prompt=two_hop-00) failed once",
    ):
        assert part in text


def test_cancel_ends_a_living_controller_and_its_jobs(slurm: Slurm, checkout: Path):
    controller = start(checkout, "tiny", "shards")
    slurm.wait_for(lambda: "RUNNING" in {slurm.job(job).state for job in active(slurm, checkout)}, what="running shard")
    done = circuitmill(checkout, "cancel", "results/tiny")
    assert done.returncode == 0, done.stderr
    assert f"controller {controller.pid} ended on SIGINT" in done.stdout
    assert controller.wait(timeout=10) != 0
    assert not active(slurm, checkout)
