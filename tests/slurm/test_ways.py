"""Other ways through Slurm: two nodes, shards together and in arrays, a preempted job, the words of a site."""

from pathlib import Path

import pytest
from tests.slurm.checkouts import Checkout, checkout, copied, differences, same_model, what_differs
from tests.slurm.conftest import Slurm

pytestmark = pytest.mark.slow


def test_two_nodes_train_what_one_does(tiny_run: Path, slurm: Slurm, tmp_path: Path):
    rules = {"run_train": {"nodes": 2, "gpus": 1, "mem_mb": 1500}}
    made = copied(tiny_run, tmp_path / "c", {"gpu_partition": "gpu", "rules": rules}, "main/train")
    run = made.start("train")
    run.until(
        lambda: [job for job in slurm.jobs() if job.folder == str(made.folder) and job.nodes == "n[3-4]"],
        "job on two nodes",
    )
    run.finish()
    log = (made.results / "logs/main/train.log").read_text()
    assert "2 ranks" in log, log
    same_model(Checkout(tiny_run, "tiny"), made)


def test_arrays_and_jobs_of_several_shards(slurm: Slurm, tiny_run: Path, tmp_path: Path):
    site = {"partition": "all", "shards_per_job": 10, "rules": {"cache_shard": {"mem_mb": 1500}}}
    made = copied(tiny_run, tmp_path / "c", site, "cache")
    run = made.start("cache", profile="slurm-array", settings="cache.train_shards=12")
    said = run.finish()
    # ten shards in one job; two and the held-out one are tasks of an array
    jobs = {job.id: job.comment for job in slurm.jobs() if job.folder == str(made.folder)}
    tasks = [job_id for job_id in jobs if "_" in job_id]
    assert len(tasks) == 3 and len({task.split("_")[0] for task in tasks}) == 1, jobs
    assert [comment for comment in jobs.values() if comment.startswith("rule_cache_shards")] != [], jobs
    assert len(list((made.results / "cache/shard").glob("*/manifest.json"))) == 13, said
    # what a job makes does not depend on how many it makes
    plain = copied(tiny_run, tmp_path / "plain", {}, "cache")
    plain.start("cache", profile="", settings="cache.train_shards=12").finish()
    assert differences(plain, made) == [], what_differs(plain, made)


def test_a_preempted_job_comes_back(slurm_alone: Slurm, tiny_run: Path, tmp_path: Path):
    slurm = slurm_alone
    site = {"partition": "preempt", "rules": {"cache_shard": {"mem_mb": 1500}}}
    made = copied(tiny_run, tmp_path / "c", site, "cache")
    run = made.start("cache")

    def running() -> list[str]:
        own = [job for job in slurm.jobs(states="RUNNING") if job.folder == str(made.folder)]
        return [job.nodes for job in own if job.comment.startswith("rule_cache_shard")]

    node = run.until(running, "job of a shard")[0]
    partition = "gpu" if node in ("n3", "n4") else "cpu"
    other = slurm.submit("sleep 5", f"--partition={partition}", f"--nodelist={node}", "--exclusive", folder=tmp_path)
    run.until(lambda: slurm.job(other).state in ("RUNNING", "COMPLETED"), "job that preempts")
    said = run.finish()
    assert "Error in rule" not in said
    assert differences(Checkout(tiny_run, "tiny"), made) == [], what_differs(Checkout(tiny_run, "tiny"), made)


def test_what_the_site_asks_for_reaches_slurm(slurm: Slurm, tmp_path: Path):
    rules = {
        "run_toyworld": {"mem_mb": 1234, "runtime": 7, "cpus": 3},
        "run_tokenize": {"gpus": 2, "gpu_model": "fake", "constraint": "slow"},
    }
    site = {"scheduler": "slurm", "partition": "cpu", "gpu_partition": "gpu", "constraint": "fast", "rules": rules}
    made = checkout(tmp_path / "c", site)
    run = made.start("tokenize")
    wanted = {"run_toyworld": "", "run_tokenize": ""}

    def shown() -> bool:
        for job in slurm.jobs():
            for rule in wanted:
                if job.folder == str(made.folder) and job.comment.startswith(f"rule_{rule}"):
                    wanted[rule] = wanted[rule] or slurm.run("scontrol", "show", "job", job.id)
        return all(wanted.values())

    run.until(shown, "both jobs")
    for word in ("Partition=cpu", "Features=fast", "TimeLimit=00:07:00", "MinMemoryNode=1234M", "CPUs/Task=3"):
        assert word in wanted["run_toyworld"], wanted["run_toyworld"]
    for word in ("Partition=gpu", "Features=slow", "gpu:fake:2", "NumNodes=1", "Requeue=1"):
        assert word in wanted["run_tokenize"], wanted["run_tokenize"]
    run.finish()
