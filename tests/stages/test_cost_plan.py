"""What a plan makes of a measured run: its own times exactly, and those of others by how much more they are."""

import shlex
import shutil
from pathlib import Path

import pytest
from tests.stages.finished_run import FEW_JOBS, GATHER, GPU, SECONDS, Finished

from circuitmill.config.compose import load_run
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.stages.cost_jobs import Places
from circuitmill.stages.cost_measured import measure
from circuitmill.stages.cost_models import MODELS
from circuitmill.stages.cost_notes import trial
from circuitmill.stages.cost_plan import Jobs, RunPlan, plan_run
from circuitmill.stages.cost_work import Activity, train_flops
from circuitmill.stores.timing import read_timing

NOBODY = Path("nobody has run this")
FOUR = Places(gpus=True, ranks=4)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "gpt2"
    Finished(load_run("gpt2", FEW_JOBS), folder).all()
    return folder


def planned(measured: Path, *overrides: str, run: str = "gpt2", places: Places = FOUR) -> RunPlan:
    few = FEW_JOBS if run == "gpt2" else []
    return plan_run(load_run(run, [*few, *overrides]), overrides, places, NOBODY, measured=measured)


def row(plan: RunPlan, rule: str) -> Jobs:
    return next(each for each in plan.jobs if each.rule == rule)


def taken(folder: Path) -> float:
    """Seconds of everything below a folder."""
    return sum(read_timing(path.parent)["wall_seconds"] for path in folder.rglob("timing.json"))


def test_a_run_is_planned_to_take_what_it_took(gpt2: Path):
    plan = planned(gpt2)
    assert plan.unknown == [] and [each.scaled for each in plan.jobs] == pytest.approx([1.0] * len(plan.jobs))
    for rule, stage, times in (
        ("run_tokenize", "tokenize", 1),
        ("run_calibrate", "calibrate", 1),
        ("cache_shard", "cache/shard", 1),
        ("run_train", "main/train", 4),
        ("run_evaluate", "main/evaluate", 1),
        ("features_block", "main/features/block", 1),
        ("interpret_block", "main/interpret/block", 1),
        ("attribute_prompt", "main/attribute/prompt", 1),
    ):
        assert row(plan, rule).seconds == pytest.approx(times * taken(gpt2 / stage), rel=1e-9), rule
    assert row(plan, "run_cache").seconds == GATHER
    assert row(plan, "cache_shard").devices == (GPU,) and row(plan, "run_tokenize").devices == ("cpu",)
    # of jobs that use a GPU, a training's seconds on all four
    assert plan.gpu_seconds == pytest.approx(
        sum(taken(gpt2 / stage) for stage in ("calibrate", "cache/shard", "main/evaluate"))
        + 4 * taken(gpt2 / "main/train")
        + sum(taken(gpt2 / f"main/{stage}") for stage in ("features/block", "attribute/prompt"))
    )


def test_one_after_the_other_it_takes_the_sum(gpt2: Path):
    plan = planned(gpt2, places=Places(gpus=True, ranks=1))
    # on one GPU the training takes four times as long
    assert plan.wall_seconds == pytest.approx(taken(gpt2) + 3 * _stepping(gpt2), rel=1e-9)
    assert list(plan.ends) == list(load_run("gpt2").stage_names())
    assert plan.ends["report"] == plan.wall_seconds


def _stepping(folder: Path) -> float:
    """Seconds of a training's steps, by its speed."""
    cfg = load_run("gpt2").config("train", "main")
    return cfg.steps * cfg.batch_tokens / 100_000


def test_more_places_take_less_time_and_as_many_hours(gpt2: Path):
    one = planned(gpt2)
    more = planned(gpt2, places=Places(gpus=True, ranks=4, nodes=2))
    assert more.gpu_seconds == pytest.approx(one.gpu_seconds)
    assert (more.wall_seconds or 0) < (one.wall_seconds or 0)
    # 22 shards on 8 places: three rounds
    shards = row(more, "cache_shard").longest or 0
    assert more.ends["cache"] - more.ends["calibrate"] == pytest.approx(3 * shards + GATHER, rel=0.05)


def test_times_follow_the_work(gpt2: Path):
    one = planned(gpt2)
    twice = planned(gpt2, "cache.train_tokens=80001024", "cache.heldout_tokens=2000896", "train.tokens=599998464")
    assert row(twice, "cache_shard").scaled == pytest.approx(2)
    assert row(twice, "cache_shard").seconds == pytest.approx(2 * (row(one, "cache_shard").seconds or 0))
    assert row(twice, "run_train").scaled == pytest.approx(2)
    # what is no step of a training is there once
    steps = 4 * 299_999_232 / 100_000
    assert row(twice, "run_train").seconds == pytest.approx((row(one, "run_train").seconds or 0) + steps)
    assert row(twice, "run_report").seconds == row(one, "run_report").seconds


def test_another_model_by_its_operations(gpt2: Path):
    plan = planned(gpt2, run="qwen3-0.6b")
    llm, small = (MODELS[name].forward_flops(1024) for name in ("Qwen/Qwen3-0.6B", "openai-community/gpt2"))
    run, own = load_run("qwen3-0.6b"), load_run("gpt2")
    tokens = [
        sum(-(-number // 1024) * 1024 for number in (cfg.train_tokens, cfg.heldout_tokens))
        for cfg in (run.config("cache"), own.config("cache"))
    ]
    assert row(plan, "cache_shard").scaled == pytest.approx(tokens[0] * llm / (tokens[1] * small))
    # as sparse as the measured one
    as_measured = Activity(20.0, 1.0)
    new, old = run.config("train", "main"), own.config("train", "main")
    # this one computes MLP outputs again
    mlps = 2 * 28 * MODELS["Qwen/Qwen3-0.6B"].mlp_numbers
    ratio = (train_flops(new, 28, 1024, as_measured) + mlps) / train_flops(old, 12, 768, as_measured)
    tokens = [cfg.steps * cfg.batch_tokens for cfg in (new, old)]
    assert run.config("cache").targets == "recomputed" and own.config("cache").targets == "stored"
    assert row(plan, "run_train").scaled == pytest.approx(tokens[0] / tokens[1] * ratio)


def test_several_shards_in_a_job_take_the_same(gpt2: Path):
    ten = plan_run(load_run("gpt2", FEW_JOBS), [], FOUR, NOBODY, measured=gpt2, shards_per_job=10)
    one = planned(gpt2)
    assert row(ten, "cache_shard").jobs == 4
    assert row(ten, "cache_shard").seconds == pytest.approx(row(one, "cache_shard").seconds)
    assert (row(ten, "cache_shard").longest or 0) > 9 * (row(one, "cache_shard").longest or 0)
    with pytest.raises(ConfigError, match="one of 1, 10, 100, 1000, 10000; found 7"):
        plan_run(load_run("gpt2"), [], FOUR, NOBODY, shards_per_job=7)


def test_what_a_job_takes_before_it_works_shows_in_jobs_of_other_sizes(tmp_path: Path):
    run = load_run("gpt2", [*FEW_JOBS, "cache.train_shards=2"])
    made = Finished(run, tmp_path / "gpt2").make("tokenize", "calibrate", "cache")
    shards = tmp_path / "gpt2/cache/shard"
    # 10 s, and 1 s for a million tokens
    for name, tokens in (("train", 20.0), ("heldout", 0.5)):
        for index in range(2):
            made.note(shards / f"{name}-0000{index}", seconds=10 + tokens, device=GPU)
    plan = planned(tmp_path / "gpt2")
    assert row(plan, "cache_shard").seconds == pytest.approx(22 * 10 + 41, rel=1e-3)
    # one size tells nothing: all of it grows with the work
    shutil.rmtree(shards / "heldout-00000")
    shutil.rmtree(shards / "heldout-00001")
    assert row(planned(tmp_path / "gpt2"), "cache_shard").seconds == pytest.approx(60 * 41 / 40, rel=1e-3)


def test_a_partly_finished_run_tells_what_it_can(tmp_path: Path):
    folder = tmp_path / "gpt2"
    Finished(load_run("gpt2", FEW_JOBS), folder).make("tokenize", "calibrate", "cache")
    (folder / "cache/manifest.json").unlink()
    for shard in sorted((folder / "cache/shard").iterdir())[1:]:
        shutil.rmtree(shard)
    plan = planned(folder)
    # one of two held-out shards is left, of 488 sequences
    assert row(plan, "cache_shard").scaled == pytest.approx(41_000_960 / (488 * 1024))
    assert row(plan, "run_train").seconds is None and row(plan, "run_train").why == "not measured"
    assert plan.unknown[:2] == ["run_cache", "run_train"] and plan.wall_seconds is not None


def test_without_a_measured_run_nothing_is_known():
    plan = plan_run(load_run("gpt2"), [], FOUR, NOBODY)
    assert plan.wall_seconds is None and len(plan.unknown) == len(plan.jobs)
    assert {each.why for each in plan.jobs} == {"nothing is measured"}


def test_what_a_cpu_took_says_nothing_about_gpus(gpt2: Path, tmp_path: Path):
    Finished(load_run("gpt2", FEW_JOBS), tmp_path / "gpt2", gpu=False).all()
    plan = planned(tmp_path / "gpt2")
    assert row(plan, "run_train").why == row(plan, "cache_shard").why == "measured on cpu, planned for GPUs"
    assert row(plan, "run_tokenize").seconds == SECONDS["tokenize"]
    on_cpu = planned(gpt2, places=Places(gpus=False, ranks=4))
    assert row(on_cpu, "run_train").why == f"measured on {GPU}, planned for CPUs"
    assert planned(tmp_path / "gpt2", places=Places(gpus=False, ranks=4)).unknown == []


def test_notes_say_what_is_taken_for_granted(gpt2: Path, tmp_path: Path):
    same = " ".join(planned(gpt2).notes)
    assert "ranks of a training" not in same and "tokens a step" not in same and "too much" not in same
    notes = " ".join(planned(gpt2, "train.batch_tokens=8192", places=Places(gpus=True, ranks=8)).notes)
    assert "ranks of a training: 8, and 4 when measured" in notes
    assert "training was measured with 4096 tokens a step, and is planned with 8192" in notes
    # a shard of less than a minute does not tell how long one of twenty times its tokens takes
    far = planned(gpt2, "cache.train_shards=1", "cache.heldout_shards=1")
    assert any(note.startswith("cache_shard: measured in jobs of less than 60 s") for note in far.notes)
    made = Finished(load_run("gpt2"), tmp_path / "gpt2").make("tokenize")
    made.note(tmp_path / "gpt2/tokenize", seconds=70.0, device="")
    assert "do not say on what device" in " ".join(planned(tmp_path / "gpt2").notes)


def test_jobs_whose_time_is_not_their_own_are_left_out(tmp_path: Path):
    folder = tmp_path / "gpt2"
    made = Finished(load_run("gpt2", FEW_JOBS), folder).make("tokenize", "calibrate", "cache", "train")
    made.note(folder / "main/train", seconds=3.0, device=GPU, ranks=4, continued=True)
    plan = planned(folder)
    assert row(plan, "run_train").why == "it continued an earlier job, whose time was not noted"
    (folder / "main/train/timing.json").unlink()
    assert row(planned(folder), "run_train").why == "no timing.json"
    shutil.rmtree(folder / "calibrate")
    assert "the calibrate that it was made from is not there" in row(planned(folder), "cache_shard").why


def test_a_run_of_which_nothing_is_finished_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match="a run of which at least one job is finished; found no manifest"):
            measure(folder)
    (tmp_path / "tokenize").mkdir()
    (tmp_path / "tokenize/manifest.json").write_text("{")
    with pytest.raises(UpstreamError, match="a complete manifest"):
        measure(tmp_path)


VARIANTS = "{clt:[],plt:['train=plt'],int4:['cache.codec=int4'],long:['train.base=plt','train.tokens=5000000']}"


def test_variants_take_what_each_of_them_took(tmp_path: Path):
    overrides = [f"+variants={VARIANTS}"]
    run, folder = load_run("demo", overrides), tmp_path / "demo"
    made = Finished(run, folder, gpu=False, ranks=1, few=2).all()
    for index, variant in enumerate(run.variants):
        made.note(folder / variant / "train", seconds=1000.0 + 100 * index, device="cpu")
    plan = planned(folder, *overrides, run="demo", places=Places(gpus=False, ranks=1))
    assert plan.unknown == [] and row(plan, "run_train").seconds == pytest.approx(4600)
    assert plan.wall_seconds == pytest.approx(taken(folder), rel=1e-9)
    assert [each.scaled for each in plan.jobs] == pytest.approx([1.0] * len(plan.jobs))
    wide = planned(folder, *overrides, run="demo", places=Places(gpus=False, ranks=1, nodes=100))
    # `long` begins when `plt` has ended
    assert wide.ends["train"] - wide.ends["cache"] == pytest.approx(1100 + 1300, rel=0.01)
    # a variant that was not measured takes what the others do, by its work
    shutil.rmtree(folder / "long/train")
    again = planned(folder, *overrides, run="demo", places=Places(gpus=False, ranks=1))
    assert row(again, "run_train").seconds > 3300 and row(again, "run_train").scaled > 1.2


def test_tokens_of_variants_that_agree_have_one_row():
    run = load_run("demo", [f"+variants={VARIANTS}"])
    found = [(each.stage, each.variants) for each in plan_run(run, [], Places(gpus=False, ranks=1), NOBODY).tokens]
    assert found == [
        ("tokenize", ()),
        ("calibrate", ()),
        ("cache", ("clt", "int4")),
        ("train", ("clt", "plt", "int4")),
        ("train", ("long",)),
        ("evaluate", ("clt", "plt", "int4", "long")),
        ("features", ("clt", "plt", "int4", "long")),
    ]


@pytest.mark.parametrize("name", ["demo", "tiny", "gpt2", "gpt2-molt", "crosscoder-base-vs-chat", "variants"])
def test_the_short_run_that_is_proposed_is_one(name: str):
    experiment, before = ("demo", [f"+variants={VARIANTS}"]) if name == "variants" else (name, [])
    before = [*before, "train.wandb=false"]
    run = load_run(experiment, before)
    *command, setting = shlex.split(trial(run, before))
    assert command == ["snakemake", "all", "--config", f"run={experiment}"]
    key, _, overrides = setting.partition("=")
    short = load_run(experiment, shlex.split(overrides))
    assert (key, short.name, short.variants) == ("set", f"{experiment}-short", run.variants)
    for variant in run.variants:
        small, whole = short.config("train", variant), run.config("train", variant)
        assert not small.wandb and small.batch_tokens == whole.batch_tokens
        # a variant's own number of tokens counts more than the run's
        assert small.steps <= 200 or variant == "long"
        cached = short.config("cache", variant)
        assert cached.heldout_tokens > 1.5 * small.monitor.heldout_tokens or name == "tiny"
        assert cached.train_tokens >= min(run.config("cache", variant).train_tokens, 4 * small.batch_tokens)


@pytest.mark.slow
def test_the_tiny_run_is_planned_to_take_what_it_took(tiny_run: Path):
    folder = tiny_run / "results/tiny"
    plan = plan_run(load_run("tiny"), [], Places(gpus=False, ranks=1), folder, measured=folder)
    assert plan.unknown == [] and plan.wall_seconds == pytest.approx(taken(folder), rel=1e-9)
    assert [each.scaled for each in plan.jobs] == pytest.approx([1.0] * len(plan.jobs))
    assert {device for each in plan.jobs for device in each.devices} == {"cpu"}
    # two places: not faster than the longest chain of jobs, nor slower than one
    two = plan_run(load_run("tiny"), [], Places(gpus=False, ranks=1, nodes=2), folder, measured=folder)
    assert 0.5 * plan.wall_seconds < (two.wall_seconds or 0) < plan.wall_seconds
