"""Training on a cache of inputs alone: outputs come from the model's own MLPs, and must be those that were captured."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.stages.small_run import make_upstreams, model_options, options, run_cache

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.errors import InterruptedRun, UpstreamError
from circuitmill.stages import train as stage
from circuitmill.stores.clt import load_clt
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.metrics import read_metrics


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    """Without the replacement model, which needs the very model of the cache."""
    plain = options("train", "tiny")
    plain["monitor"]["behaviour_tokens"] = 0
    return decode(TrainConfig, plain, "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A copy, whose weights tests may change and put back."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    return make_upstreams(tmp_path_factory.mktemp("stored"), model, n_texts=1000, codec="float32", chunk_bytes=16_384)


def alone(stored: dict[str, Path], model: Path, out: Path, **changes: object) -> dict[str, Path]:
    """Another cache of the same tokens, of inputs alone."""
    plain = options("cache", "tiny", model=model_options(model), targets="recomputed", chunk_bytes=16_384)
    folder = stored["tokenize"].parent.parent
    made = run_cache(
        decode(CacheConfig, plain | changes, "cache"), stored["tokenize"], folder / "calibrate" / "manifest.json", out
    )
    return {"tokenize": stored["tokenize"], "cache": made}


@pytest.fixture(scope="module")
def recomputed(stored: dict[str, Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alone(stored, model, tmp_path_factory.mktemp("recomputed"), codec="float32")


def test_computed_targets_train_the_same_transcoder_as_stored_ones(
    cfg: TrainConfig, stored: dict[str, Path], recomputed: dict[str, Path], tmp_path: Path
) -> None:
    """To 1e-4 of the largest parameter and of EV: outputs differ in the last place of float32, and Adam divides."""
    one, two = (
        stage.run(cfg, **upstreams, out=tmp_path / name)
        for name, upstreams in (("stored", stored), ("recomputed", recomputed))
    )
    assert one.counts["ev"] > 0.1
    assert two.counts["ev"] == pytest.approx(one.counts["ev"], abs=1e-4)
    models = [load_clt(manifest.folder / "model").state_dict() for manifest in (one, two)]
    for name, value in models[0].items():
        assert (models[1][name] - value).abs().max() <= 1e-4 * value.abs().max(), name
    rows = [read_metrics(manifest.folder / "metrics.jsonl") for manifest in (one, two)]
    for first, second in zip(*rows, strict=True):
        for key in ("loss", "ev", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-3), (first["step"], key)


def test_targets_of_quantised_inputs_are_those_of_the_inputs_as_restored(
    cfg: TrainConfig, stored: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    """With eight bits the fit is as good as with exact numbers, to half a percent of the variance."""
    upstreams = alone(stored, model, tmp_path / "cache", codec="int8", group_channels=16, chunk_bytes=4096)
    ours = stage.run(cfg, **upstreams, out=tmp_path / "int8")
    exact = stage.run(cfg, **stored, out=tmp_path / "float32")
    assert ours.counts["ev"] == pytest.approx(exact.counts["ev"], abs=5e-3)


def changed(model: Path, part: str) -> None:
    """Every matrix with such a name a little larger."""
    tensors = load_file(model / "model.safetensors")
    assert any(part in name for name in tensors)
    save_file(
        {name: value * 1.01 if part in name else value for name, value in tensors.items()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture
def weights(model: Path) -> Path:
    kept = (model / "model.safetensors").read_bytes()
    yield model / "model.safetensors"
    (model / "model.safetensors").write_bytes(kept)


def test_a_model_whose_mlps_have_changed_is_refused(
    cfg: TrainConfig, recomputed: dict[str, Path], stored: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    changed(weights.parent, "mlp.c_fc.weight")
    with pytest.raises(UpstreamError, match=r"the MLPs that the cache was made with(.|\n)*run stage cache again"):
        stage.run(cfg, **recomputed, out=tmp_path / "train")
    assert not (tmp_path / "train" / "manifest.json").exists()
    assert not list((tmp_path / "train").glob("checkpoints/*"))
    # with targets on disk nobody asks for the model
    weights.unlink()
    assert stage.run(cfg, **stored, out=tmp_path / "stored").counts["steps"] == 32


def test_a_model_that_has_changed_elsewhere_still_has_the_same_targets(
    cfg: TrainConfig, recomputed: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    changed(weights.parent, "attention.q_proj")
    stage.run(cfg, **recomputed, out=tmp_path / "train")
    load_manifest(tmp_path / "train" / "manifest.json", "train").verify()
    measuring = dataclasses.replace(cfg, monitor=dataclasses.replace(cfg.monitor, behaviour_tokens=64))
    with pytest.raises(UpstreamError, match=r"a cache of model(.|\n)*run stage cache again with this model"):
        stage.run(measuring, **recomputed, out=tmp_path / "measured")


def test_a_stopped_training_on_computed_targets_continues_to_the_same_bits(
    cfg: TrainConfig, recomputed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.run(cfg, **recomputed, out=tmp_path / "whole")
    calls = iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr(stage.StopRequest, "__bool__", lambda self: next(calls) == 9)
        stage.run(cfg, **recomputed, out=tmp_path / "broken")
    again = stage.run(cfg, **recomputed, out=tmp_path / "broken")
    models = [load_clt(manifest.folder / "model").state_dict() for manifest in (whole, again)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_a_streamed_training_is_the_same_with_captured_and_with_computed_targets(
    cfg: TrainConfig, stored: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    results = []
    for targets in ("stored", "recomputed"):
        upstreams = alone(stored, model, tmp_path / targets, mode="stream", targets=targets)
        assert not (upstreams["cache"].parent / "shard").exists()
        results.append(stage.run(cfg, **upstreams, out=tmp_path / f"{targets}-train").counts)
    captured, computed = results
    assert captured["ev"] > 0.1
    assert computed["ev"] == pytest.approx(captured["ev"], abs=1e-4)
    assert computed["l0"] == pytest.approx(captured["l0"], rel=1e-3)
