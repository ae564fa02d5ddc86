"""`circuitmill plan`: where shapes are from, what it proposes, and that the proposal can be pasted."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import REPOSITORY
from tests.stages.finished_run import FEW_JOBS, GPU, SECONDS, Finished

from circuitmill import cli
from circuitmill.config.compose import load_run
from circuitmill.stages.cost_models import MODELS
from circuitmill.stores.manifest import StageOutput


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli.main(["plan", *arguments]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_gpt2_on_eight_gpus(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "--gpus", "8", "--gpu-memory", "80")
    assert plan["shape"] == {"n_layers": 12, "d_model": 768, "from": "the model"}
    # 12 encoders and 78 decoders of 24,576 x 768, and the vectors
    matrix = 24_576 * 768
    assert plan["parameters"]["all"] == (12 + 78) * matrix + 2 * 12 * 24_576 + 12 * 768
    found = {(each["strategy"], each["feature_ranks"]): each for each in plan["estimates"]}
    assert set(found) == {("single", 1), ("ddp", 1), ("fsdp", 1), ("features", 8), ("mesh", 2), ("mesh", 4)}
    assert found["single", 1]["impossible"] == "8 ranks"
    assert found["ddp", 1]["memory"]["weights"] == 4 * plan["parameters"]["all"]
    assert found["features", 8]["wire"]["step"]["reconstructions"] == 4096 * 12 * 768 * 4
    proposal = plan["proposal"]
    assert proposal["fits"] and proposal["codec"] == "int8" and "cache.codec=int8" in proposal["overrides"]
    sizes = {each["codec"]: each for each in plan["codecs"]}
    # inputs and outputs: a byte a number, one for every 32 numbers, and where the token is from
    assert sizes["int8"]["token_bytes"] == 2 * 12 * (768 + 24) + 16
    assert sizes["int8"]["cache_bytes"] == 41_000_000 * sizes["int8"]["token_bytes"]
    assert sizes["int8"]["step_bytes"] == 4096 * sizes["int8"]["token_bytes"]


@pytest.mark.parametrize("run", ["gpt2", "demo", "qwen3-0.6b", "gpt2-molt"])
def test_what_is_proposed_can_be_pasted(run: str, capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, f"experiment={run}", "--gpus", "4")
    own = load_run(run, plan["proposal"]["overrides"]).config("train", plan["variant"])
    assert own.parallel.strategy == plan["proposal"]["strategy"]
    assert own.optimizer.micro_batches == plan["proposal"]["micro_batches"]
    again = planned(capsys, f"experiment={run}", *plan["proposal"]["overrides"], "--gpus", "4")
    assert again["proposal"] == plan["proposal"]


def test_tables_say_the_same(capsys: pytest.CaptureFixture[str]):
    out = text(capsys, "experiment=gpt2-molt", "--gpus", "8")
    assert "2,373,627,216" in out and "not possible: transforms of several ranks" in out
    assert "gradients scattered (by torch)" in out and "780 GB" in out
    plan = planned(capsys, "experiment=gpt2-molt", "--gpus", "8")
    assert " ".join(plan["proposal"]["overrides"]) in out


def test_overrides_count(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "train.n_features=1000", "--gpus", "1")
    assert plan["parameters"]["thresholds"] == 12_000


def test_micro_batches_until_it_fits(capsys: pytest.CaptureFixture[str]):
    arguments = ["experiment=gpt2", "train.n_features=4096", "train.batch_tokens=65536", "--gpus", "1"]
    roomy = planned(capsys, *arguments, "--gpu-memory", "200")
    narrow = planned(capsys, *arguments, "--gpu-memory", "30")
    assert roomy["proposal"]["micro_batches"] == 1 < narrow["proposal"]["micro_batches"]
    assert narrow["proposal"]["fits"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "--gpus", "1", "--gpu-memory", "24", code=1)
    assert not plan["proposal"]["fits"]
    assert any(one.startswith("GPUs with ") for one in plan["remedies"])
    (ranks,) = [one.split()[0] for one in plan["remedies"] if one.endswith("GPUs of 24.0 GB")]
    planned(capsys, "experiment=gpt2", "--gpus", ranks, "--gpu-memory", "24")
    (smaller,) = [one for one in plan["remedies"] if one.startswith("train.n_features=")]
    planned(capsys, "experiment=gpt2", smaller, "--gpus", "1", "--gpu-memory", "24")
    assert "Nothing fits" in text(capsys, "experiment=gpt2", "--gpus", "1", "--gpu-memory", "24", code=1)


def test_ranks_on_cpus_share_the_machine(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=demo", "--cpu", "4", "--memory", "16")
    assert (plan["device"], plan["ranks"], plan["memory_bytes"]) == ("cpu", 4, 4_000_000_000)
    (one,) = [each for each in plan["estimates"] if each["strategy"] == "ddp"]
    # what is shuffled and what is saved is in the same memory
    assert one["reserve"] > 500_000_000 + sum(one["host"].values())


def test_the_embedded_model_s_own_configuration(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=tiny")
    assert (plan["shape"]["n_layers"], plan["shape"]["d_model"]) == (2, 32)


def test_variants(capsys: pytest.CaptureFixture[str]):
    quoted = "{plain: [], sae: ['cache=resid_post', 'train=sae'], both: ['cache=two_models', 'train=model_diff']}"
    variants = f"+variants={quoted}".replace(" ", "")

    def places(variant: str) -> int:
        return planned(capsys, "experiment=demo", variants, "--variant", variant)["shape"]["n_layers"]

    assert planned(capsys, "experiment=demo", variants)["variant"] == "plain"
    # one place a block, of one model and of two
    assert (places("sae"), places("both")) == (4, 8)
    assert "a variant of run demo" in refused(capsys, "experiment=demo", variants, "--variant", "other")


def test_chosen_layers_of_two_models(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=crosscoder-base-vs-chat", "--gpus", "1")
    assert plan["shape"] == {"n_layers": 2, "d_model": 2304, "from": "the model"}
    # inputs alone are stored
    (int8,) = [each for each in plan["codecs"] if each["codec"] == "int8"]
    assert int8["token_bytes"] == 2 * (2304 + 72) + 16


def test_a_model_that_is_not_known(capsys: pytest.CaptureFixture[str]):
    other = ["experiment=gpt2", "model.name=somebody/else", "--gpus", "8"]
    message = refused(capsys, *other)
    assert "found somebody/else" in message and "--shape LAYERSxWIDTH" in message
    plan = planned(capsys, *other, "--shape", "6x512")
    assert plan["shape"] == {"n_layers": 6, "d_model": 512, "from": "--shape"}
    assert "two numbers as in 12x768" in refused(capsys, *other, "--shape", "6by512")
    assert "layers from 0 to 5" in refused(
        capsys, "experiment=crosscoder-base-vs-chat", "--gpus", "1", "--shape", "6x512"
    )


def test_shipped_models_are_known():
    options = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "config/model").glob("*.yaml")]
    hub = {one["name"] for one in options if one["source"] == "huggingface"}
    assert hub <= set(MODELS)


def test_a_finished_cache_says_it_all(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    cfg = load_run("gpt2", ["cache.codec=int4", "model.name=somebody/else"]).config("cache")
    counts = {"n_layers": 5, "d_model": 64, "tokens": {"train": 900, "heldout": 100}}
    StageOutput("cache", cfg, {}, tmp_path).finish(counts)
    plan = planned(capsys, "experiment=gpt2", "--gpus", "1", "--cache", str(tmp_path / "manifest.json"))
    assert plan["shape"] == {"n_layers": 5, "d_model": 64, "from": "the cache"}
    assert plan["cached_tokens"] == 1000
    # it is there, so that no codec is proposed
    assert plan["proposal"]["codec"] == "" and not any("codec" in one for one in plan["proposal"]["overrides"])


def test_the_disk_decides_about_the_codec(capsys: pytest.CaptureFixture[str]):
    def codec(disk: str) -> str:
        return planned(capsys, "experiment=gpt2", "--gpus", "8", "--disk", disk)["proposal"]["codec"]

    # checkpoints and all else take 67 GB; an int2 cache takes 213
    assert [codec("1000"), codec("500"), codec("300")] == ["int8", "int4", "int2"]
    # where nothing fits, the configured one stays
    assert codec("250") == "int8"


def test_codecs_that_cannot_be(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "cache.group_channels=34", "--gpus", "1", "--shape", "4x34")
    problems = {each["codec"]: each["problem"] for each in plan["codecs"]}
    assert "multiple of 4" in problems["int2"] and not problems["int8"]


def test_streamed_activations_have_no_codec(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "cache.mode=stream", "--gpus", "1")
    assert plan["codecs"] == [] and not any("codec" in one for one in plan["proposal"]["overrides"])
    assert any("language model" in note for note in plan["notes"])


@pytest.mark.parametrize("option", [["--gpus", "-1"], ["--cpu", "0"], ["--gpus", "1", "--gpu-memory", "0"]])
def test_numbers_that_make_no_sense(option: list[str], capsys: pytest.CaptureFixture[str]):
    assert "a number above 0" in refused(capsys, "experiment=demo", *option)


def test_no_strategy_is_possible(capsys: pytest.CaptureFixture[str]):
    message = refused(capsys, "experiment=demo", "--cpu", "3")
    assert "no multiple of 3 ranks" in message


def test_the_whole_run_in_tables_and_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    arguments = ["experiment=gpt2", "--gpus", "8", "--results", str(tmp_path)]
    plan, out = planned(capsys, *arguments), text(capsys, *arguments)
    tokens = {(row["stage"]): (row["train"], row["heldout"]) for row in plan["tokens"]}
    assert tokens["tokenize"] == tokens["cache"] == (40_000_512, 1_000_448)
    assert tokens["train"] == (299_999_232, 0) and "7.5 times the cache" in out
    jobs = {row["rule"]: row["jobs"] for row in plan["jobs"]["rules"]}
    assert (jobs["cache_shard"], jobs["features_block"], plan["jobs"]["configure"]) == (164, 24, 9)
    assert plan["jobs"]["all"] == sum(jobs.values()) + 9 == 233
    stored = {each["stage"]: each["bytes"] for each in plan["disk"]["stored"]}
    # two checkpoints of weights and two moments, a third that is being written
    assert stored["train"] == pytest.approx(3 * 12 * plan["parameters"]["all"], rel=1e-3)
    assert plan["disk"]["bytes"] == plan["disk"]["left"] == sum(stored.values())
    assert plan["disk"]["where"] == str(tmp_path) and plan["disk"]["free"] > 0
    assert "40,000,512" in out and "164 shards" in out and "in each of 24 blocks" in out and "847 GB" in out


def test_hours_are_not_known_and_how_they_would_be(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "train.seed=5", "--gpus", "8")
    assert plan["time"]["wall_seconds"] is None and plan["time"]["gpu_seconds"] is None
    out = text(capsys, "experiment=gpt2", "train.seed=5", "--gpus", "8")
    assert "Hours are not known" in out and plan["time"]["how_to_measure"] in out
    assert "train.seed=5 name=gpt2-short" in plan["time"]["how_to_measure"] and "GPU time" not in out


def test_hours_from_a_run_on_such_hardware(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    Finished(load_run("gpt2", FEW_JOBS), tmp_path / "gpt2").all()
    arguments = ["experiment=gpt2", *FEW_JOBS, "--gpus", "4", "--nodes", "2", "--measured", str(tmp_path / "gpt2")]
    plan, out = planned(capsys, *arguments), text(capsys, *arguments)
    train = next(row for row in plan["jobs"]["rules"] if row["rule"] == "run_train")
    assert train["seconds"] == pytest.approx(4 * SECONDS["train"]) and train["scaled"] == pytest.approx(1)
    assert plan["time"]["gpu_seconds"] > train["seconds"] and plan["time"]["places"] == 8
    assert plan["time"]["wall_seconds"] == plan["time"]["ends"]["report"] and plan["time"]["unknown"] == []
    assert "Wall time on 2 nodes x 4 GPUs: " in out and GPU in out and "67 min" in out
    assert any("not counted in times" in note for note in plan["notes"])
    assert "at least" not in out.split("Wall time")[1]
    for option in (["--nodes", "0"], ["--gpus-per-node", "2", "--nodes", "1"], ["--shards-per-job", "3"]):
        assert option[0] in refused(capsys, *arguments, *option)
    assert "found no manifest" in refused(capsys, "experiment=gpt2", "--measured", str(tmp_path / "gone"))


def test_a_run_that_does_not_fit_on_the_disk_is_warned_of(capsys: pytest.CaptureFixture[str]):
    plan = planned(capsys, "experiment=gpt2", "--gpus", "8", "--disk", "500")
    (warning,) = plan["warnings"]
    assert plan["disk"]["short"] and "cache.codec=int4 (469 GB in all)" in warning
    assert plan["proposal"]["codec"] == "int4" and plan["disk"]["where"] == "--disk"
    out = text(capsys, "experiment=gpt2", "--gpus", "8", "--disk", "500")
    assert "WARNING: 847 GB are still to be stored, 500 GB are free (--disk): 347 GB too little" in out
    assert "more than the disk has" in out
    fits = planned(capsys, "experiment=gpt2", "cache.codec=int4", "--gpus", "8", "--disk", "500")
    assert fits["warnings"] == [] and not fits["disk"]["short"]


def test_sizes_that_are_not_known(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    unlimited = ["tokenize.max_train_tokens=null", "cache.train_tokens=null"]
    plan, out = (asked(capsys, "experiment=gpt2", *unlimited, "--gpus", "8") for asked in (planned, text))
    assert plan["disk"]["unknown"] == ["tokenize", "cache"] and plan["tokens"][0]["train"] is None
    assert "all there are" in out and "size not known: tokenize, cache" in out
