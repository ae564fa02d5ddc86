"""What a site file makes of the workflow: jobs of several shards, GPUs and memory of one machine, Slurm's resources."""

import json
import re
import shutil
from typing import Any

import pytest
import yaml
from tests.workflow.conftest import Workflow

pytestmark = pytest.mark.slow

SHARDS = "set=cache.train_shards=24"


def write_site(workflow: Workflow, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    path = workflow.folder / "site.yaml"
    path.write_text(yaml.safe_dump({"scheduler": "slurm"} | options))
    monkeypatch.setenv("CIRCUITMILL_SITE", str(path))


def test_one_job_makes_several_shards(workflow: Workflow, monkeypatch: pytest.MonkeyPatch):
    write_site(workflow, monkeypatch, shards_per_job=10)
    config = ["--config", "run=tiny", SHARDS]
    planned = workflow.planned("cache", *config)
    # 24 are two jobs of ten, and four of one; the one held-out shard is a job
    assert (planned["cache_shards"], planned["cache_shard"], planned["run_cache"]) == (2, 5, 1)
    workflow.snakemake("cache", *config)
    shards = workflow.folder / "results/tiny/cache/shard"
    assert len(list(shards.glob("*/manifest.json"))) == 25
    call = json.loads((shards / "train-00013/manifest.json").read_text())
    names = [f"train-000{number}" for number in range(10, 20)]
    assert call[: call.index("--config")] == ["cache", "--shard", *names]
    assert call[call.index("--out") + 1 :] == [f"results/tiny/cache/shard/{name}" for name in names]
    assert (workflow.folder / "results/tiny/logs/cache/shard/train-0001.log").is_file()
    # how many a job makes is no reason to make them again
    assert workflow.planned("cache", *config) == {}
    write_site(workflow, monkeypatch, shards_per_job=1)
    assert workflow.planned("cache", *config) == {}
    (shards / "train-00013/manifest.json").unlink()
    assert workflow.planned("cache", *config)["cache_shard"] == 1


def test_groups_are_those_of_every_variant(workflow: Workflow, monkeypatch: pytest.MonkeyPatch):
    text = (workflow.folder / "config/experiment/tiny.yaml").read_text().replace("name: tiny", "name: sweep")
    text += "variants:\n  a: [cache.train_shards=20]\n  b: [cache.train_shards=10]\n"
    (workflow.folder / "config/experiment/sweep.yaml").write_text(text)
    write_site(workflow, monkeypatch, shards_per_job=10)
    planned = workflow.planned("cache", "--config", "run=sweep")
    # the second ten of a are made one by one: b does not have them
    assert (planned["cache_shards"], planned["cache_shard"]) == (2, 10 + 2)


def test_jobs_on_one_machine_share_its_gpus(workflow: Workflow, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    text = workflow.snakemake("train", "--profile", "profiles/gpu", "--config", "run=tiny")
    assert 'Resource("gpu", 3)' in text and re.search(r'Resource\("mem_mb", \d{4,}\)', text)
    found = json.loads((workflow.folder / "results/tiny/cache/shard/train-00000/gpus.json").read_text())
    assert found[0] == "2,3,5"
    assert {"cache_shard=1", "run_train=3"} <= set(found[1].split(","))
    launched = json.loads((workflow.folder / "results/tiny/main/train/launch.json").read_text())
    assert launched[:3] == ["launch", "--per-node", "3"]
    assert len(re.findall(r"rule cache_shard:", text)) == 3


def test_a_machine_without_gpus_says_nothing_of_them(workflow: Workflow, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    workflow.snakemake("cache", "--profile", "profiles/gpu", "--config", "run=tiny")
    assert not (workflow.folder / "results/tiny/cache/shard/train-00000/gpus.json").exists()


def slurm_dry_run(workflow: Workflow, target: str, *arguments: str) -> str:
    # the plugin asks Slurm for its settings when it starts, but a dry run does not get there
    return workflow.snakemake(target, "-n", "--profile", "profiles/slurm", *arguments)


def test_resources_of_the_example_site(workflow: Workflow):
    profiles = workflow.folder / "profiles/slurm"
    shutil.copy(profiles / "site.example.yaml", profiles / "site.yaml")
    text = slurm_dry_run(workflow, "train", "--config", "run=gpt2")
    blocks = dict(re.findall(r"^rule (\w+):\n((?:    .*\n)+)", text, re.MULTILINE))
    shard, train, tokens = (blocks[name] for name in ("cache_shard", "run_train", "run_tokenize"))
    assert "slurm_partition=gpu" in shard and "gpu=1" in shard and "mem_mb=16000" in shard
    assert "slurm_partition=gpu" in train and "gpu=4" in train and "slurm_extra=--signal=USR1@120" in train
    assert "runtime=720" in train and "cpus_per_task=16" in train
    assert "slurm_partition=cpu" in tokens and "gpu=" not in tokens


def test_a_missing_site_file_says_what_to_do(workflow: Workflow):
    text = workflow.snakemake("-n", "--profile", "profiles/slurm", check=False)
    assert "cp profiles/slurm/site.example.yaml profiles/slurm/site.yaml, and edit it" in text
    assert "Job stats" not in text


def test_a_container_is_started_behind_srun_on_several_nodes(workflow: Workflow, monkeypatch: pytest.MonkeyPatch):
    write_site(workflow, monkeypatch, rules={"run_train": {"nodes": 2, "gpus": 2}})
    again = ["train", "-n", "-p", "--forcerun", "run_train", "--config", "run=demo"]
    step = "srun -N 2 -n 2 --cpus-per-task=2 --gres=gpu:2"
    assert f"{step} python -m circuitmill launch --per-node 2" in workflow.snakemake(*again)


def test_every_call_is_noted(finished_workflow: Workflow):
    lines = (finished_workflow.folder / "results/demo/logs/controllers.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["folder"] == str(finished_workflow.folder) and "all" in first["argv"]
    assert (finished_workflow.folder / first["log"]).is_file()


def test_touching_a_finished_run_leaves_it_finished(workflow: Workflow):
    before = {path: path.read_bytes() for path in (workflow.folder / "results/demo").rglob("manifest.json")}
    workflow.snakemake("all", "--touch")
    assert "Nothing to be done" in workflow.snakemake("all")
    assert before == {path: path.read_bytes() for path in before}


def test_ten_thousand_shards(workflow: Workflow):
    import resource

    planned = workflow.planned("cache", "--config", "run=tiny", "set=cache.train_shards=10000")
    assert planned["cache_shard"] == 10_001
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2_000_000
