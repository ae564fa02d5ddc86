"""Every option file of `train` at the smallest size: it trains, is stored, and comes back as the same function."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.conftest import REPOSITORY
from tests.stages.small_run import CONTEXT, make_upstreams, options

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.errors import UpstreamError
from circuitmill.stages import train as stage
from circuitmill.stages.train_data import TrainData
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.metrics import read_metrics
from circuitmill.stores.tensors import read_tensors
from circuitmill.stores.transcoders import load_transcoder

NEEDS_BASE = ("end_to_end", "adapter")
OF_HOOKPOINTS = ("sae", "crosscoder", "model_diff")
OPTIONS = sorted(path.stem for path in (REPOSITORY / "config/train").glob("*.yaml"))
SMALL = {
    "n_features": 42,
    "tokens": 24_576,
    "batch_tokens": 256,
    "pool_tokens": 2_048,
    "warmup_tokens": 512,
    "dead_tokens": 4_096,
    "checkpoint_tokens": 24_576,
    "wandb": False,
}
LEAST_EV = 0.35
"""What every option but those of a size or coefficient for other models reaches on the tiny model."""


def small(option: str, **changes) -> TrainConfig:
    """An option file at the size of the tests."""
    plain = options("train", option) | SMALL | changes
    form = plain["architecture"]
    form |= {"prefixes": [10, 42] if form["prefixes"] else [], "ranks": [3, 2, 1] if form["ranks"] else []}
    form |= {"rank": min(form["rank"], 4), "shared": min(form["shared"], 5)}
    plain["init"] |= {"l0": 4}
    plain["nonlinearity"] |= {"calibration_tokens": 512}
    if plain["nonlinearity"]["k"]:
        plain["nonlinearity"]["k"] = 6.0
    plain["monitor"] |= {"log_tokens": 4_096, "heldout_tokens": 512, "behaviour_tokens": 64}
    plain["monitor"] |= {"heldout_every_tokens": 12_288}
    return decode(TrainConfig, plain, "train")


@pytest.fixture(scope="module")
def mlps(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    return make_upstreams(tmp_path_factory.mktemp("mlps"), tiny_model_dir, n_texts=1000)


@pytest.fixture(scope="module")
def hookpoints(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hookpoints")
    return make_upstreams(folder, tiny_model_dir, n_texts=1000, hookpoint="resid_post", targets="inputs")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, mlps: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("base") / "train"
    stage.run(small("default"), **mlps, out=out)
    return out / "manifest.json"


def heldout_ev(cache: Path, folder: Path) -> float:
    store = ActivationStore.open(load_manifest(cache, "cache"))
    coder, n_tokens = load_transcoder(folder / "model"), store.n_tokens("heldout")
    paired = not coder.architecture.reproduces
    rows = store.read("heldout", 0, n_tokens, outputs=paired)
    y = rows.outputs if paired else rows.inputs
    explained = ExplainedVariance(coder.n_layers, coder.d_model)
    explained.update(y, coder(rows.inputs))
    return explained.pooled()


@pytest.mark.slow
@pytest.mark.parametrize("option", [one for one in OPTIONS if one not in (*OF_HOOKPOINTS, *NEEDS_BASE, "gpt2")])
def test_an_option_of_mlps_trains(option, mlps, tmp_path):
    cfg = small(option)
    manifest = stage.run(cfg, **mlps, out=tmp_path)
    assert manifest.counts["architecture"]["topology"] == cfg.architecture.topology
    coder = load_transcoder(tmp_path / "model")
    assert dataclasses.replace(coder.architecture, prefixes=(), pair_scale=False) == dataclasses.replace(
        cfg.architecture, prefixes=(), pair_scale=False
    )
    assert (tmp_path / "circuit_tracer").is_dir() == (
        not cfg.architecture.untraceable and coder.architecture != ArchitectureConfig()
    )
    assert heldout_ev(mlps["cache"], tmp_path) > LEAST_EV
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["heldout_ev"] is not None
    assert ("replacement_kl" in last) == (not cfg.architecture.unreplaceable)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["sae", "crosscoder"])
def test_an_option_of_hookpoints_trains(option, hookpoints, tmp_path):
    stage.run(small(option), **hookpoints, out=tmp_path)
    assert heldout_ev(hookpoints["cache"], tmp_path) > LEAST_EV
    assert "replacement_kl" not in read_metrics(tmp_path / "metrics.jsonl")[-1]


@pytest.mark.slow
def test_a_crosscoder_over_two_models_trains(tmp_path, tiny_model_dir, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, local_files_only=True)
    torch.manual_seed(3)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight += 0.1 * torch.randn_like(model.transformer.h[1].mlp.c_proj.weight)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model_dir, local_files_only=True).save_pretrained(other)
    second = {"source": "folder", "name": str(other), "revision": "", "dtype": "float32"}
    changes = {"hookpoint": "resid_post", "targets": "inputs", "second_model": second}
    (tmp_path / "up").mkdir()
    upstreams = make_upstreams(tmp_path / "up", tiny_model_dir, n_texts=1000, **changes)
    stage.run(small("model_diff"), **upstreams, out=tmp_path / "train")
    coder = load_transcoder(tmp_path / "train" / "model")
    assert (coder.n_layers, coder.n_sources, coder.architecture.models) == (4, 1, 2)
    # folding gives each model its own scale, so nothing is shared afterwards but directions
    cosine = torch.cosine_similarity(*coder.decoder_block(0)[:5].unflatten(1, (2, 2)).unbind(dim=1), dim=2)
    torch.testing.assert_close(cosine, torch.ones(5, 2), rtol=0, atol=1e-4)
    row = read_metrics(tmp_path / "train" / "metrics.jsonl")[-1]
    assert row["relative_norm_histogram"] and row["cosine_histogram"]
    assert heldout_ev(upstreams["cache"], tmp_path / "train") > LEAST_EV


@pytest.mark.slow
def test_fine_tuning_through_the_language_model_lowers_kl(base, mlps, tmp_path):
    cfg = small("end_to_end", tokens=4 * 8 * CONTEXT * 8, batch_tokens=8 * CONTEXT, lr=2e-3)
    stage.run(cfg, **mlps, base=base, out=tmp_path)
    before = read_metrics(base.parent / "metrics.jsonl")[-1]["replacement_kl"]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["replacement_kl"] < before
    assert rows[-1]["loss_kl"] > 0


@pytest.mark.slow
def test_an_adapter_changes_decoders_alone(base, mlps, tmp_path):
    stage.run(small("adapter", adapter_rank=2), **mlps, base=base, out=tmp_path)
    ours, theirs = load_transcoder(tmp_path / "model"), load_transcoder(base.parent / "model")
    torch.testing.assert_close(ours.W_enc, theirs.W_enc, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.threshold, theirs.threshold, rtol=1e-5, atol=1e-6)
    for source in range(2):
        change = (ours.decoder_block(source) - theirs.decoder_block(source)).flatten(1)
        sizes = torch.linalg.svdvals(change.double())
        assert sizes[0] > 1e-3 and (sizes[4:] < 1e-4 * sizes[0]).all()


def test_a_base_and_its_name_come_together(base, mlps, tmp_path):
    with pytest.raises(UpstreamError, match="the output of training clt; found none"):
        stage.run(small("adapter", adapter_rank=2), **mlps, out=tmp_path)
    with pytest.raises(UpstreamError, match="no other training"):
        stage.run(small("default"), **mlps, base=base, out=tmp_path)


@pytest.mark.slow
def test_a_streamed_hookpoint_gives_the_stored_ones_numbers(hookpoints, tmp_path, tiny_model_dir):
    streamed = make_upstreams(
        tmp_path, tiny_model_dir, n_texts=1000, hookpoint="resid_post", targets="inputs", mode="stream"
    )
    pairs = []
    for upstreams in (hookpoints, streamed):
        inputs = {name: load_manifest(path, name) for name, path in upstreams.items()}
        from circuitmill.core.scaling import Scaling

        ones = torch.ones(2)
        data = TrainData(inputs, Scaling.by_layer(ones, ones, 16))
        ((x, y),) = data.heldout(tokens=100, batch_tokens=100, key="k")
        assert torch.equal(x, y)
        pairs.append(x)
    torch.testing.assert_close(pairs[0], pairs[1], rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_checkpoints_of_l0_and_an_early_end(mlps, tmp_path):
    cfg = small("default")
    loss = cfg.loss | {"tanh_sparsity": dataclasses.replace(cfg.loss["tanh_sparsity"], coefficient=20.0)}
    cfg = dataclasses.replace(cfg, loss=loss, checkpoint_l0=(3.5,), stop_l0=3.0, tokens=98_304)
    manifest = stage.run(cfg, **mlps, out=tmp_path)
    assert manifest.counts["ended"] == "stop_l0" and manifest.counts["tokens"] < cfg.tokens
    (kept,) = (tmp_path / "checkpoints").glob("l0-*")
    assert "parameter.W_enc" in read_tensors(next(kept.glob("*.safetensors")))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["lr"] == pytest.approx(0.0, abs=1e-5)
