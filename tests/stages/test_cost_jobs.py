"""The jobs that a plan counts are those that Snakemake counts; when they run on so many places."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tests.conftest import REPOSITORY

from circuitmill.config.compose import load_run
from circuitmill.config.run import Run
from circuitmill.errors import ConfigError
from circuitmill.stages import cost
from circuitmill.stages.cost_jobs import GPU_RULES, Group, Key, Places, at_once, configure_jobs, groups, wall_times

NOBODY = Path("nobody has run this")


def jobs(run: Run, shards_per_job: int = 1) -> list[Group]:
    return groups(run, cost.settings_of(run, NOBODY), shards_per_job)


def counted(run: Run, shards_per_job: int = 1) -> dict[str, int]:
    found = Counter({"configure": configure_jobs(run)})
    for group in jobs(run, shards_per_job):
        found[group.rule] += len(group.jobs)
    return dict(found)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    return folder


def planned(checkout: Path, *arguments: str) -> dict[str, int]:
    """Rule -> jobs of a dry run, its target left out."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--cores", "1", "all", *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=300)
    text = done.stdout + done.stderr
    table = re.search(r"job\s+count\n[-\s]+\n((?:\S+\s+\d+\n)+)", text)
    assert table is not None, text
    rows = dict(re.findall(r"(\S+)\s+(\d+)\n", table.group(1)))
    return {name: int(number) for name, number in rows.items() if name not in ("total", "all")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "gpt2", "architectures", "codec_study", "crosscoder-base-vs-chat"])
def test_jobs_are_those_of_a_dry_run(name: str, checkout: Path):
    assert counted(load_run(name)) == planned(checkout, "--config", f"run={name}")


@pytest.mark.slow
def test_jobs_of_a_streaming_run(checkout: Path):
    run = load_run("gpt2", ["cache.mode=stream"])
    assert "cache_shard" not in counted(run)
    assert counted(run) == planned(checkout, "--config", "run=gpt2", "set=cache.mode=stream")


@pytest.mark.slow
def test_several_shards_in_a_job(checkout: Path):
    site = checkout / "site.yaml"
    site.write_text("scheduler: slurm\nshards_per_job: 10\n")
    found = planned(checkout, "--config", "run=gpt2", f"where={site}")
    # 16 tens of the 160, and 4 held-out ones by themselves
    assert found.pop("cache_shards") == 16 and found["cache_shard"] == 4
    assert counted(load_run("gpt2"), 10) == {**found, "cache_shard": 20}


def test_a_job_of_several_shards_does_all_their_work():
    run = load_run("gpt2")
    alone, together = (next(group for group in jobs(run, size) if group.stage == "cache") for size in (1, 100))
    assert [len(job) for job in together.jobs] == [100] + [1] * 64
    assert sum(together.jobs, ()) == sum(alone.jobs, ()) and together.work == alone.work


def test_rules_that_the_profile_gives_gpus():
    rules = yaml.safe_load((REPOSITORY / "profiles/gpu/site.yaml").read_text())["rules"]
    assert {name for name, own in rules.items() if own.get("gpus") or own.get("all_gpus")} == set(GPU_RULES)


VARIANTS = (
    "{clt:[],plt:['train=plt'],skip:['train=skip'],adapter:['train=adapter'],long:['train.base=clt'],"
    "sae:['cache=resid_post','train=sae'],crosscoder:['cache=resid_post','train=crosscoder']}"
)


@pytest.fixture(scope="module")
def variants() -> Run:
    return load_run("demo", [f"+variants={VARIANTS}"])


def test_what_waits_for_what(variants: Run):
    needs = {group.key: group.needs for group in jobs(variants)}
    assert needs["run_tokenize", ""] == (("run_toyworld", ""),)
    assert ("run_cache", "sae") in needs["run_train", "crosscoder"]
    assert ("run_train", "clt") in needs["run_train", "adapter"]
    assert ("features_block", "plt") in needs["run_features", "plt"]
    assert set(needs["run_report", "clt"]) >= {("run_evaluate", "plt"), ("run_cache", "sae")}
    # a transcoder that cannot be traced has no graphs to gather
    assert not any(key[0] == "attribute_prompt" for key in needs["run_attribute", "skip"])
    known = set(needs)
    assert all(need in known for own in needs.values() for need in own)


def test_jobs_that_do_not_wait_for_each_other(variants: Run):
    found = at_once(jobs(variants))
    assert {variants.base(variant) for variant in variants.variants} == {"", "demo/clt"}
    # the one that two others start from waits for none of them, but they for it
    assert found["run_train"] == 6 and found["run_evaluate"] == 7 and found["cache_shard"] == 10


def group(rule: str, seconds: list[float], *needs: str) -> tuple[Group, list[float]]:
    return Group(rule, rule, "", tuple((1.0,) for _ in seconds), tuple((need, "") for need in needs)), seconds


def spans(places: int, *made: tuple[Group, list[float]], wide: int = 1) -> dict[str, tuple[float, float]]:
    durations = {own.rule: seconds for own, seconds in made}
    found: dict[Key, tuple[float, float]] = wall_times(
        [own for own, _ in made],
        lambda own: durations[own.rule],
        places,
        lambda own: wide if own.rule == "train" else 1,
    )
    return {rule: span for (rule, _), span in found.items()}


def test_on_one_place_times_add_up():
    dag = group("cache", [3.0, 2.0]), group("gather", [1.0], "cache"), group("train", [10.0], "gather")
    assert spans(1, *dag) == {"cache": (0, 5), "gather": (5, 6), "train": (6, 16)}


def test_jobs_run_side_by_side_as_far_as_there_are_places():
    shards = group("cache", [2.0] * 7)
    ends = [spans(places, shards, group("gather", [1.0], "cache"))["gather"] for places in (2, 3, 7, 100)]
    assert ends == [(8, 9), (6, 7), (2, 3), (2, 3)]


def test_a_wide_job_waits_until_there_is_room_and_later_ones_for_it():
    dag = group("first", [4.0, 1.0]), group("train", [10.0]), group("last", [1.0])
    assert spans(4, *dag, wide=4) == {"first": (0, 4), "train": (4, 14), "last": (14, 15)}
    # a place is left beside it
    assert spans(5, *dag, wide=4) == {"first": (0, 4), "train": (1, 11), "last": (4, 5)}


def test_variants_train_one_after_the_other_where_there_is_no_more_room():
    dag = group("train", [5.0, 5.0, 5.0]), group("report", [1.0], "train")
    assert spans(8, *dag, wide=8)["report"] == (15, 16)
    assert spans(16, *dag, wide=8)["report"] == (10, 11)


def test_numbers_of_places_that_make_no_sense():
    assert Places(gpus=True, ranks=8).total == 8
    assert Places(gpus=True, ranks=8, nodes=4, per_node=4).total == 16
    with pytest.raises(ConfigError, match="at least the 8 ranks of a training; found 1 x 4"):
        Places(gpus=True, ranks=8, nodes=1, per_node=4)
    with pytest.raises(ConfigError, match="a number above 0; found 0(.|\n)*--nodes"):
        Places(gpus=True, ranks=8, nodes=0)
    with pytest.raises(ConfigError, match="--gpus-per-node"):
        Places(gpus=True, ranks=8, per_node=-1)
