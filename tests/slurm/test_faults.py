"""The whole workflow on a real Slurm, undisturbed and with what happens on clusters: every file is the same in the end.

A fault is put in when the job it is for runs, never after a time. Trainings are held by SIGSTOP, which takes wall time
and no processor's, so that their time limit comes.
"""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from tests.slurm.checkouts import RUN, SITE, Checkout, Snakemake, checkout, differences, what_differs
from tests.slurm.conftest import Slurm

from circuitmill.stores.verify import verify

pytestmark = pytest.mark.slow

FAULTY = SITE | {"partition": "cpu", "warn_s": 1, "rules": {"run_train": {"runtime": 2}}}
"""Slurm looks at time limits every 30 s: it warns half a minute early or less, and ends half a minute late or less."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The run on this machine, without Slurm."""
    made = checkout(tmp_path_factory.mktemp("local") / "c")
    made.start("all", profile="").finish()
    return made


@pytest.fixture(scope="module")
def through_slurm(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Snakemake:
    """The run through Slurm from its first stage, on nodes that stay up; begun."""
    return checkout(tmp_path_factory.mktemp("slurm") / "c").start("all")


def running(slurm: Slurm, made: Checkout, rule: str) -> list[str]:
    """Ids of the Slurm jobs of a rule that run now."""
    return [
        job.id
        for job in slurm.jobs(states="RUNNING")
        if job.folder == str(made.folder) and job.comment.startswith(f"rule_{rule}")
    ]


def trainer(made: Checkout) -> int | None:
    """The process that trains, once it has written metrics: its signal handlers are there."""
    metrics = made.results / "main/train/metrics.jsonl"
    if not metrics.is_file() or (made.results / "main/train/manifest.json").exists():
        return None
    found = [pid for pid, command in made.processes("circuitmill", "train").items() if "launch" not in command]
    return found[0] if found else None


def hold(run: Snakemake, made: Checkout, *, through_the_warning: bool) -> None:
    """Stop the training until Slurm ends it: by its warning, which wakes it up, or else by the time limit itself."""
    pid = run.until(lambda: trainer(made), "training", poll=0.01)
    os.kill(pid, signal.SIGSTOP)

    def gone() -> bool:
        if not Path(f"/proc/{pid}").exists():
            return True
        if through_the_warning:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return False

    run.until(gone, "end of the training by its time limit", seconds=400, poll=0.01)


def equal(one: Checkout, other: Checkout) -> None:
    """All manifests are the same, byte for byte, and all files are as they say."""
    assert differences(one, other) == [], what_differs(one, other)
    assert not verify(other.results).problems


@pytest.mark.timeout(3600)
def test_killed_snakemake_cancelled_job_time_limits_restarted_scheduler_and_dead_node(
    through_slurm: Snakemake, undisturbed: Checkout, slurm_alone: Slurm, tmp_path: Path
):
    """The other one runs meanwhile, on other nodes."""
    slurm = slurm_alone
    made = checkout(tmp_path / "c", FAULTY, after=undisturbed)
    run = made.start("all")
    orphans = run.until(lambda: running(slurm, made, "cache_shard"), "job of a shard")
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    assert set(orphans) & set(running(slurm, made, "cache_shard"))
    run = Snakemake(made, ["circuitmill", "resume", f"results/{RUN}"])
    run.until(lambda: not set(orphans) & set(running(slurm, made, "cache_shard")), "end of the orphans")
    cancelled = run.until(lambda: running(slurm, made, "cache_shard"), "job of a shard")[0]
    slurm.run("scancel", cancelled)

    hold(run, made, through_the_warning=False)
    slurm.restart_controller()
    hold(run, made, through_the_warning=True)

    lost = run.until(lambda: running(slurm, made, "features_block"), "job of a block")[0]
    node = slurm.job(lost).nodes
    slurm.node_down(node)
    run.until(lambda: slurm.job(lost).state != "RUNNING", "requeued job")
    slurm.node_up(node)

    said = run.finish()
    equal(undisturbed, made)
    assert said.count("Error in rule run_train") >= 2 and said.count("Error in rule cache_shard") == 1
    assert "Error in rule features_block" not in said  # Slurm's own affair
    assert re.search(r"continuing after step \d+ of 128", (made.results / "logs/main/train.log").read_text())


def test_the_run_through_slurm_is_the_local_run(undisturbed: Checkout, through_slurm: Snakemake):
    through_slurm.finish()
    equal(undisturbed, through_slurm.checkout)
    kept = through_slurm.checkout.folder / ".snakemake/slurm_logs"
    assert {"rule_cache_shard", "rule_run_train", "rule_attribute_prompt"} <= {path.name for path in kept.iterdir()}
