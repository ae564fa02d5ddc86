"""How much a job is: operations against torch's own count, tokens against what stages did."""

import dataclasses
from pathlib import Path

import pytest
import torch
from benchmarks import step_floor
from tests.training.helpers import tiny
from torch.utils.flop_counter import FlopCounterMode

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.compose import load_run
from circuitmill.config.train import NonlinearityConfig, TermConfig, TrainConfig
from circuitmill.core.adapters import adapt
from circuitmill.core.transcoder import Transcoder
from circuitmill.stages import cost
from circuitmill.stages.cost_models import MODELS
from circuitmill.stages.cost_work import Activity, Setting, decoding, encoding, stage_work, train_flops, unit_work
from circuitmill.training.objective import Moment, evaluate_batch

LAYERS, WIDTH, TOKENS = 3, 8, 64
NOBODY = Path("nobody has run this")
IDLE = Activity(0.0, 0.0)
FORMS = {
    "clt": ArchitectureConfig(),
    "plt": ArchitectureConfig(topology="plt"),
    "acausal": ArchitectureConfig(topology="acausal"),
    "sae": ArchitectureConfig(topology="sae"),
    "crosscoder": ArchitectureConfig(topology="crosscoder"),
    "models": ArchitectureConfig(topology="crosscoder", models=3, shared=5),
    "target": ArchitectureConfig(decoder="target"),
    "source": ArchitectureConfig(decoder="source"),
    "source, scaled": ArchitectureConfig(decoder="source", pair_scale=True),
    "low rank": ArchitectureConfig(decoder="low_rank", rank=3),
    "skip": ArchitectureConfig(skip=True),
    "molt": ArchitectureConfig(topology="molt", ranks=(4, 2)),
    "matryoshka": ArchitectureConfig(prefixes=(8, 30)),
}


def of_form(form: ArchitectureConfig, nonlinearity: NonlinearityConfig, products: str) -> TrainConfig:
    own = {"loss": {"reconstruction": TermConfig(1.0)}, "nonlinearity": nonlinearity, "products": products}
    return dataclasses.replace(tiny(), n_features=30, architecture=form, **own)


def counted(cfg: TrainConfig, transcoder: Transcoder) -> float:
    """What torch counts of a step for a token, terms of the loss but the first left out."""
    x, y = torch.randn(2, TOKENS, LAYERS, WIDTH)
    like = torch.zeros(transcoder.n_sources, 30)
    moment = Moment(TOKENS, like > 0, like, 0)
    with FlopCounterMode(display=False) as counter:
        evaluate_batch(transcoder, x, y, cfg, moment).loss.backward()
    return counter.get_total_flops() / TOKENS


def make(form: ArchitectureConfig) -> Transcoder:
    torch.manual_seed(0)
    transcoder = Transcoder(LAYERS, 30, WIDTH, form)
    for parameter in transcoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        transcoder.log_threshold.fill_(-torch.inf)
    transcoder.log_threshold.requires_grad_(False)
    return transcoder


@pytest.mark.parametrize("form", FORMS)
def test_operations_of_a_training_with_all_activations_are_those_that_torch_counts(form: str):
    cfg = of_form(FORMS[form], NonlinearityConfig("relu"), "dense")
    assert counted(cfg, make(FORMS[form])) == train_flops(cfg, LAYERS, WIDTH, IDLE)


@pytest.mark.parametrize("form", ["clt", "crosscoder", "skip", "low rank"])
def test_with_active_features_alone_torch_counts_what_finds_them(form: str):
    """Products with few places are operators of our own, which torch does not count."""
    cfg = of_form(FORMS[form], NonlinearityConfig("topk", k=3.0), "sparse")
    found, own = counted(cfg, make(FORMS[form])), decoding(cfg, LAYERS, WIDTH)
    assert found == 2 * encoding(cfg, LAYERS, WIDTH) + 6 * own.dense + 4 * own.inputs
    places = 0.1 * (4 * encoding(cfg, LAYERS, WIDTH) + 6 * own.features)
    assert train_flops(cfg, LAYERS, WIDTH, IDLE) == pytest.approx(found + places)


@pytest.mark.parametrize(("k", "products"), [(16.0, "sparse"), (16.0, "dense"), (4096.0, "sparse")])
def test_operations_of_a_training_are_those_of_the_benchmark(k: float, products: str):
    sizes = step_floor.Shape(n_layers=6, n_features=4096, d_model=256, batch_tokens=1024)
    own = {"nonlinearity": NonlinearityConfig("topk", k=k), "products": products}
    cfg = tiny(n_features=4096, init__encoder_bias="zero", **own)
    if products == "dense":
        expected = step_floor.dense_flop(sizes)
    else:
        expected = sum(step_floor.sparse_flop(sizes, [int(k) * 1024] * 6))
    assert 1024 * train_flops(cfg, 6, 256, IDLE) == pytest.approx(expected, rel=1e-12)


def test_an_adapter_s_change_alone_is_trained():
    cfg = of_form(FORMS["clt"], NonlinearityConfig("relu"), "dense")
    cfg = dataclasses.replace(cfg, base="other", adapter_rank=2)
    adapted = adapt(make(FORMS["clt"]), 2, generator=torch.Generator().manual_seed(0))
    # what is trained takes no gradient of activations, which do not change
    assert counted(cfg, adapted) == pytest.approx(train_flops(cfg, LAYERS, WIDTH, IDLE), rel=0.1)


def test_a_training_without_a_k_is_as_sparse_as_the_measured_one():
    cfg = of_form(FORMS["clt"], NonlinearityConfig("relu"), "auto")
    dense = train_flops(cfg, LAYERS, WIDTH, Activity(3.0, 0.0))
    few = train_flops(cfg, LAYERS, WIDTH, Activity(3.0, 1.0))
    assert train_flops(cfg, LAYERS, WIDTH, Activity(3.0, 0.5)) == pytest.approx((dense + few) / 2)
    assert few == pytest.approx(0.1 * dense + 2 * encoding(cfg, LAYERS, WIDTH))


def setting(run: str, *overrides: str, activity: Activity | None = IDLE) -> Setting:
    loaded = load_run(run, list(overrides))
    return cost.settings_of(loaded, NOBODY / run, activities={"main": activity})["main"]


def test_work_of_gpt2():
    found, gpt2 = setting("gpt2"), MODELS["openai-community/gpt2"]
    forward = gpt2.forward_flops(1024)
    assert stage_work("tokenize", found) == 40_000_512 + 1_000_448
    assert stage_work("calibrate", found) == 65_536 * forward
    shards = unit_work("cache", found)
    assert len(shards) == 164 and stage_work("cache", found) == 164
    assert sum(work or 0 for work in shards.values()) == pytest.approx((40_000_512 + 1_000_448) * forward)
    cfg = load_run("gpt2").config("train", "main")
    assert stage_work("train", found) == pytest.approx(299_999_232 * train_flops(cfg, 12, 768, IDLE))
    blocks = unit_work("features", found)
    # ten million and a million tokens in whole sequences, an encoder's 24th
    assert set(blocks.values()) == {(9_999_360 + 999_424) * 2 * 12 * 24_576 * 768 / 24}
    assert set(unit_work("interpret", found).values()) == {12 * 24_576 / 24}
    assert set(unit_work("attribute", found).values()) == {4096 * forward}
    transcoder = 2 * (12 + 78) * 24_576 * 768
    logits = gpt2.forward_flops(1024, logits=True)
    expected = 49_152 * (forward + transcoder + 5 * logits + transcoder) + 8192 * (38 * logits + transcoder)
    assert stage_work("evaluate", found) == pytest.approx(expected)
    assert stage_work("report", found) == 1


def test_shards_are_those_of_the_stage():
    found = setting("gpt2", "cache.train_shards=7")
    slices = load_run("gpt2", ["cache.train_shards=7"]).config("cache").slices({"train": 39_063, "heldout": 977}, 1024)
    assert found.shards() == {name: (stop - start) * 1024 for name, (_, start, stop) in slices.items()}


def test_what_runs_beside_a_training_is_its_work_too():
    plain = stage_work("train", setting("gpt2")) or 0
    tokens, gpt2 = 299_999_232, MODELS["openai-community/gpt2"]
    streamed = stage_work("train", setting("gpt2", "cache.mode=stream")) or 0
    assert streamed - plain == pytest.approx(tokens * gpt2.forward_flops(1024))
    assert unit_work("cache", setting("gpt2", "cache.mode=stream")) == {}
    recomputed = stage_work("train", setting("gpt2", "cache.targets=recomputed")) or 0
    assert recomputed - plain == pytest.approx(tokens * 2 * 12 * gpt2.mlp_numbers)
    together = stage_work("train", setting("gpt2", "+train.loss.kl.coefficient=1.0")) or 0
    assert together > plain + tokens * 2 * gpt2.forward_flops(1024)
    blocks = unit_work("features", setting("gpt2", "cache.mode=stream"))
    assert (blocks["0000"] or 0) > (9_999_360 + 999_424) * gpt2.forward_flops(1024)


def test_a_transcoder_that_replaces_nothing_is_evaluated_once():
    found = setting("crosscoder-base-vs-chat")
    both = 2 * MODELS["google/gemma-2-2b"].forward_flops(1024)
    # one source reads and writes two places
    assert stage_work("evaluate", found) == pytest.approx(49_152 * (both + 2 * 4 * 73_728 * 2304))


def test_what_the_text_decides_is_not_known():
    found = setting("gpt2", "tokenize.max_train_tokens=null", "cache.train_tokens=null")
    assert found.tokens("train") is None and found.cached("train") is None
    assert found.tokens("heldout") == found.cached("heldout") == 1_000_448
    shards = unit_work("cache", found)
    assert stage_work("tokenize", found) is None and shards["train-00000"] is None and shards["heldout-00000"]
    # a budget says it all the same
    assert stage_work("calibrate", found) == 65_536 * MODELS["openai-community/gpt2"].forward_flops(1024)
    assert stage_work("train", setting("gpt2", activity=None)) is None


def test_the_embedded_corpus_makes_about_so_many_tokens():
    found = setting("demo")
    assert found.about and found.cached("train") == 1_200_000
    # 120,000 documents of 16 tokens, 3.3% of them held out
    assert found.tokens("heldout") == pytest.approx(120_000 * 16 * 0.033, rel=0.01)


@pytest.mark.slow
def test_tokens_are_those_that_stages_worked_on(tiny_run: Path):
    from circuitmill.stores.manifest import load_manifest

    run, folder = load_run("tiny"), tiny_run / "results/tiny"
    before, after = (cost.settings_of(run, where)["main"] for where in (NOBODY, folder))
    counts = load_manifest(folder / "tokenize/manifest.json").counts
    for split in ("train", "heldout"):
        assert after.tokens(split) == 32 * counts["sequences"][split]
        assert before.tokens(split) == pytest.approx(after.tokens(split), rel=0.1)
    assert before.about and not after.about
    cached = load_manifest(folder / "cache/manifest.json").counts["tokens"]
    bos = sum(cached.values()) / 5120
    # a document has 15 tokens besides BOS, which is left out
    assert after.cached("train") == before.cached("train") == 4096 and 0.9 < bos < 0.95
    assert load_manifest(folder / "main/train/manifest.json").counts["tokens"] == 8192
    evaluated = load_manifest(folder / "main/evaluate/manifest.json").counts["tokens"]
    assert evaluated == pytest.approx(bos * (after.evaluated()[0] or 0), rel=0.02)
    featured = load_manifest(folder / "main/features/manifest.json").counts["tokens"]
    assert sum(featured.values()) == pytest.approx(bos * sum(n or 0 for n in after.featured().values()), rel=0.02)
