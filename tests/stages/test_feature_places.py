"""Stages features and interpret on transcoders whose features are not one MLP's, or write no vectors."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.stages.small_run import (
    CONTEXT,
    DEAD,
    N_FEATURES,
    N_LAYERS,
    RESID,
    make_cache,
    make_second_model,
    make_train,
    model_options,
    options,
    random_transcoder,
)

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.decode import decode
from circuitmill.config.features import FeaturesConfig
from circuitmill.config.interpret import InterpretConfig
from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import UpstreamError
from circuitmill.lm.hookpoints import unembedding
from circuitmill.lm.load import load_language_model
from circuitmill.stages import features, interpret
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.explanations import ExplanationStore
from circuitmill.stores.features import FeatureStore
from circuitmill.stores.manifest import Manifest, load_manifest

WINDOW, BLOCKS = 12, 2


@pytest.fixture(scope="module")
def cfg(tiny_model_dir: Path) -> FeaturesConfig:
    whole = {"max_train_tokens": None, "max_heldout_tokens": None}
    plain = options("features", "tiny", model=model_options(tiny_model_dir), window=WINDOW, blocks=BLOCKS, **whole)
    return decode(FeaturesConfig, plain, "features")


@pytest.fixture(scope="module")
def second(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_second_model(tmp_path_factory.mktemp("model") / "second", tiny_model_dir)


@pytest.fixture(scope="module")
def stream(tiny_model_dir: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of the residual stream of two models."""
    folder = tmp_path_factory.mktemp("stream")
    return make_cache(folder, tiny_model_dir, **RESID, second_model=model_options(second))


CROSSCODER = ArchitectureConfig(topology="crosscoder", models=2)


def run_features(cfg: FeaturesConfig, paths: dict[str, Path], out: Path) -> Manifest:
    for block in cfg.units():
        features.run_unit(cfg, block=block, **paths, out=out / "block" / block)
    return features.run(cfg, **paths, out=out)


def run_interpret(manifest: Manifest, out: Path) -> Manifest:
    cfg = decode(InterpretConfig, options("interpret", "tiny", blocks=BLOCKS), "interpret")
    path = manifest.folder / "manifest.json"
    for block in cfg.units():
        interpret.run_unit(cfg, block=block, features=path, out=out / "block" / block)
    return interpret.run(cfg, features=path, out=out)


def activations(paths: dict[str, Path], transcoder: Transcoder) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Sequence, position and activations [token source feature] of the train split."""
    store = ActivationStore.open(load_manifest(paths["cache"], "cache"))
    rows = store.read("train", 0, store.n_tokens("train"), outputs=False)
    return rows.sequence.astype(np.int64), rows.position.astype(np.int64), transcoder.encode(rows.inputs)


def test_a_crosscoder_over_models_has_one_layer_of_features(
    cfg: FeaturesConfig, stream: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    transcoder = random_transcoder(stream["cache"], architecture=CROSSCODER)
    paths = stream | {"train": make_train(tmp_path / "train", stream["cache"], transcoder)}
    manifest = run_features(cfg, paths, tmp_path / "features")
    assert (manifest.counts["n_layers"], manifest.counts["n_features"]) == (1, N_FEATURES)
    store = FeatureStore.open(manifest)
    rows = store.features().to_pylist()
    assert [(row["layer"], row["feature"]) for row in rows] == [(0, feature) for feature in range(N_FEATURES)]
    sequence, position, active = activations(paths, transcoder)
    for row in rows:
        values = active[:, 0, row["feature"]]
        assert row["n_active"] == int((values > 0).sum())
        assert row["act_max"] == pytest.approx(float(values.max()), rel=1e-5)
    grid = torch.zeros(int(sequence.max()) + 1, CONTEXT)
    grid[sequence, position] = active[:, 0, 7]
    windows = [row for row in store.windows_of([(0, 7)])[0, 7] if row["split"] == "train"]
    assert {row["kind"] for row in windows} == {"top", "quantile", "silent"}
    for row in windows:
        part = slice(row["start"], min(row["start"] + WINDOW, CONTEXT))
        torch.testing.assert_close(torch.tensor(row["activations"]), grid[row["sequence"], part])

    lm = load_language_model(ModelConfig(**model_options(second)), toyworld=None, device=torch.device("cpu"))
    readout = unembedding(lm.model)[: len(lm.tokenizer)]
    effects = transcoder.decoder_block(0)[:, N_LAYERS:].sum(dim=1) @ (readout - readout.mean(0)).T
    for row, effect in zip(rows, effects, strict=True):
        assert row["top_logits"][0]["token"] == int(effect.argmax())
        assert row["top_logits"][0]["value"] == pytest.approx(float(effect.max()), rel=1e-4)

    explained = run_interpret(manifest, tmp_path / "interpret")
    assert explained.counts["features"] == N_FEATURES
    found = ExplanationStore.open(explained)
    assert found.get(0, DEAD[1])["explanation"].startswith("dead:")
    assert found.get(0, 7)["explanation"].startswith("fires on")


def test_a_streamed_cache_of_two_models_gives_the_same(
    cfg: FeaturesConfig, stream: dict[str, Path], second: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    transcoder = random_transcoder(stream["cache"], architecture=CROSSCODER)
    live = make_cache(tmp_path, tiny_model_dir, **RESID, second_model=model_options(second), mode="stream")
    tables = []
    for name, paths in (("stored", stream), ("live", live)):
        train = make_train(tmp_path / name / "train", paths["cache"], transcoder)
        out = tmp_path / name / "0001"
        features.run_unit(cfg, block="0001", **paths, train=train, out=out)
        store = load_manifest(out / "manifest.json", "features", "0001")
        tables.append(pq.read_table(store.file("features.parquet")))
    names = ["layer", "feature", "n_active", "histogram", "top_logits"]
    assert tables[0].select(names).equals(tables[1].select(names))


def test_a_second_model_that_has_changed_since_is_refused(
    cfg: FeaturesConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    second = make_second_model(tmp_path / "second", tiny_model_dir)
    paths = make_cache(tmp_path, tiny_model_dir, **RESID, second_model=model_options(second))
    train = make_train(tmp_path / "train", paths["cache"], random_transcoder(paths["cache"], architecture=CROSSCODER))
    (second / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes())
    with pytest.raises(UpstreamError, match="a cache of model .*second.*; found one of a model with digest"):
        features.run_unit(cfg, block="0000", **paths, train=train, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ({"topology": "molt", "ranks": (3,)}, {}),
        ({"topology": "sae"}, {"hookpoint": "mlp_in", "targets": "inputs"}),
    ],
    ids=["transforms", "behind a norm"],
)
def test_what_writes_no_vector_to_the_stream_promotes_nothing(
    cfg: FeaturesConfig, tiny_model_dir: Path, architecture: dict, changes: dict, tmp_path: Path
) -> None:
    paths = make_cache(tmp_path, tiny_model_dir, **changes)
    transcoder = random_transcoder(paths["cache"], architecture=ArchitectureConfig(**architecture))
    paths |= {"train": make_train(tmp_path / "train", paths["cache"], transcoder)}
    manifest = run_features(cfg, paths, tmp_path / "features")
    rows = FeatureStore.open(manifest).features().to_pylist()
    assert len(rows) == N_LAYERS * N_FEATURES
    assert all(row["top_logits"] == row["bottom_logits"] == [] for row in rows)
    active = activations(paths, transcoder)[2]
    assert [row["n_active"] for row in rows] == (active > 0).sum(dim=0).flatten().tolist()
    found = ExplanationStore.open(run_interpret(manifest, tmp_path / "interpret"))
    assert len(found) == N_LAYERS * N_FEATURES
    assert all(row["promotes"] == [] for row in found.table().to_pylist())
    assert found.get(1, 7)["explanation"].startswith("fires on")


def test_offsets_leave_features_their_tokens(cfg: FeaturesConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    paths = make_cache(tmp_path, tiny_model_dir)
    form = ArchitectureConfig(decoder="source", pair_scale=True, pair_offset=True)
    transcoder = random_transcoder(paths["cache"], architecture=form)
    train = make_train(tmp_path / "train", paths["cache"], transcoder)
    unit = features.run_unit(cfg, block="0000", **paths, train=train, out=tmp_path / "0000")
    rows = pq.read_table(unit.file("features.parquet")).to_pylist()
    assert all(len(row["top_logits"]) == cfg.logits for row in rows)
