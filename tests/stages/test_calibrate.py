import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.stages.small_run import CONTEXT, make_tokens, model_options, options

from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.decode import decode
from circuitmill.core.calibration import channel_constants
from circuitmill.errors import ConfigError, DivergedError, UpstreamError
from circuitmill.lm import sites
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import load_language_model
from circuitmill.stages import calibrate
from circuitmill.stores.calibration import CALIBRATION, Calibration
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.stores.normalization import load_moments
from circuitmill.stores.tokens import TokenStore


@pytest.fixture(scope="module")
def cfg(tiny_model_dir: Path) -> CalibrateConfig:
    plain = options("calibrate", "tiny", model=model_options(tiny_model_dir), tokens=20 * CONTEXT, sample_tokens=300)
    return decode(CalibrateConfig, plain | {"batch_sequences": 7}, "calibrate")


@pytest.fixture(scope="module")
def tokens(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens"), tiny_model_dir)


@pytest.fixture(scope="module")
def finished(cfg: CalibrateConfig, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    calibrate.run(cfg, tokenize=tokens, out=tmp_path_factory.mktemp("calibrate"))
    return calibrate.run(cfg, tokenize=tokens, out=tmp_path_factory.mktemp("calibrate"))


def chosen(tokens: Path, wanted: int) -> np.ndarray:
    """Sequences spread evenly over the train split, first and last among them."""
    store = TokenStore.open(load_manifest(tokens, "tokenize"))
    there = store.n_sequences("train")
    numbers = [round(index * (there - 1) / (wanted - 1)) for index in range(wanted)]
    return np.concatenate([store.read("train", number, number + 1) for number in numbers])


def captured(cfg: CalibrateConfig, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    lm = load_language_model(cfg.model, toyworld=None, device=torch.device("cpu"))
    sides = capture_mlp(lm, torch.from_numpy(ids.astype(np.int64)))
    return tuple(side[torch.from_numpy(ids != 1)] for side in sides)


def test_moments_are_those_of_sequences_all_over_the_split(
    finished: Manifest, cfg: CalibrateConfig, tokens: Path
) -> None:
    ids = chosen(tokens, 20)
    assert TokenStore.open(load_manifest(tokens, "tokenize")).n_sequences("train") > 60
    for moments, x in zip(load_moments(finished.folder / "moments.safetensors"), captured(cfg, ids), strict=True):
        wide = x.double()
        assert moments.count == len(x) == (ids != 1).sum()
        # batches of another size round differently
        torch.testing.assert_close(moments.mean, wide.mean(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.m2, (wide - wide.mean(dim=0)).square().sum(dim=0), rtol=1e-4, atol=0)


def test_constants_are_of_the_first_tokens_of_a_shuffled_order(
    finished: Manifest, cfg: CalibrateConfig, tokens: Path
) -> None:
    ids = np.random.default_rng(0).permutation(chosen(tokens, 20))
    read = Calibration.load(finished)
    for place, x in zip(("inputs", "outputs"), captured(cfg, ids), strict=True):
        center, scale = channel_constants(x[:300])
        torch.testing.assert_close(read.places[place].center, center, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.places[place].scale, scale, rtol=1e-4, atol=1e-5)
        assert (read.places[place].bits.diff(dim=1) > -0.05).all(), "finer steps cost more"


def test_counts_and_files(finished: Manifest, tokens: Path) -> None:
    load_manifest(finished.folder / "manifest.json", "calibrate").verify()
    assert set(finished.files) == {CALIBRATION, "moments.safetensors"}
    assert finished.counts == {
        "tokens": int((chosen(tokens, 20) != 1).sum()),
        "sample_tokens": 300,
        "hookpoint": "mlp",
        "places": ["mlp.0", "mlp.1"],
        "n_layers": 2,
        "d_model": 16,
        "model_digest": finished.counts["model_digest"],
    }
    assert finished.inputs == {"tokenize": load_manifest(tokens, "tokenize").digest}


def test_the_same_work_gives_the_same_bytes(
    finished: Manifest, cfg: CalibrateConfig, tokens: Path, tmp_path: Path
) -> None:
    again = calibrate.run(cfg, tokenize=tokens, out=tmp_path)
    assert again.digest == finished.digest
    for name in finished.files:
        assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes()


def test_more_tokens_than_there_are_means_all(cfg: CalibrateConfig, tokens: Path, tmp_path: Path) -> None:
    greedy = dataclasses.replace(cfg, tokens=10**9, sample_tokens=10**9, batch_sequences=1000)
    counts = calibrate.run(greedy, tokenize=tokens, out=tmp_path).counts
    store = TokenStore.open(load_manifest(tokens, "tokenize"))
    assert (
        counts["tokens"] == counts["sample_tokens"] == (store.read("train", 0, store.n_sequences("train")) != 1).sum()
    )


def test_one_sequence_is_enough(cfg: CalibrateConfig, tokens: Path, tmp_path: Path) -> None:
    counts = calibrate.run(dataclasses.replace(cfg, tokens=1, sample_tokens=1), tokenize=tokens, out=tmp_path).counts
    assert 20 < counts["tokens"] < CONTEXT and counts["sample_tokens"] == 1
    tensors = load_file(tmp_path / CALIBRATION)
    assert all(value.isfinite().all() for value in tensors.values()) and (tensors["inputs_scale"] > 0).all()


def test_activations_that_are_not_finite_are_refused(
    cfg: CalibrateConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, outputs = capture_mlp(*arguments)
        outputs[:, 1] = float("inf")
        return inputs, outputs

    monkeypatch.setattr(sites, "capture_mlp", broken)
    with pytest.raises(DivergedError, match=r"finite MLP outputs(.|\n)*layer 1"):
        calibrate.run(cfg, tokenize=tokens, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_another_tokenizer_is_refused(cfg: CalibrateConfig, tokens: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    changed = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, name=str(other)))
    with pytest.raises(ConfigError, match=r"the tokenizer that made the token store"):
        calibrate.run(changed, tokenize=tokens, out=tmp_path / "out")


def test_missing_tokens_are_named_before_any_work(cfg: CalibrateConfig, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r"nowhere/manifest\.json"):
        calibrate.run(cfg, tokenize=tmp_path / "nowhere" / "manifest.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
