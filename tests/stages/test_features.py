import dataclasses
import json
import shutil
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
    WORDS,
    make_cache,
    make_train,
    model_options,
    options,
    random_transcoder,
)
from transformers import AutoTokenizer

from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.decode import decode
from circuitmill.config.features import FeaturesConfig
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError, StoreError, UpstreamError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import unembedding
from circuitmill.lm.load import ModelConfig, load_language_model
from circuitmill.stages import cache, calibrate, features, tokenize
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.clt import load_clt
from circuitmill.stores.features import FeatureStore
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.stores.tokens import TokenStore

WINDOW = 12
"""Does not divide the context, so the last window of a sequence is shorter."""


@pytest.fixture(scope="module")
def cfg(tiny_model_dir: Path) -> FeaturesConfig:
    plain = options(
        "features", "tiny", model=model_options(tiny_model_dir), window=WINDOW, blocks=3, max_train_tokens=None
    )
    return decode(FeaturesConfig, plain | {"max_heldout_tokens": None}, "features")


@pytest.fixture(scope="module")
def upstreams(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upstreams")
    paths = make_cache(folder, tiny_model_dir)
    return paths | {"train": make_train(folder / "train", paths["cache"], random_transcoder(paths["cache"]))}


def run_all(cfg: FeaturesConfig, upstreams: dict[str, Path], out: Path) -> Manifest:
    for block in cfg.units():
        features.run_unit(cfg, block=block, **upstreams, out=out / "block" / block)
    return features.run(cfg, **upstreams, out=out)


@pytest.fixture(scope="module")
def finished(cfg: FeaturesConfig, upstreams: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return run_all(cfg, upstreams, tmp_path_factory.mktemp("features"))


@dataclasses.dataclass(frozen=True)
class Truth:
    """All activations of a split on the grid of sequences and positions, zero at BOS."""

    activations: torch.Tensor
    tokens: np.ndarray
    n_tokens: int


@pytest.fixture(scope="module")
def truth(upstreams: dict[str, Path]) -> dict[str, Truth]:
    store = ActivationStore.open(load_manifest(upstreams["cache"], "cache"))
    tokens = TokenStore.open(load_manifest(upstreams["tokenize"], "tokenize"))
    clt = load_clt(upstreams["train"].parent / "model")
    found = {}
    for split in ("train", "heldout"):
        rows = store.read(split, 0, store.n_tokens(split))
        grid = torch.zeros(tokens.n_sequences(split), CONTEXT, N_LAYERS, N_FEATURES)
        grid[rows.sequence.astype(np.int64), rows.position.astype(np.int64)] = clt.encode(rows.inputs).detach()
        found[split] = Truth(grid, tokens.read(split, 0, tokens.n_sequences(split)), len(rows.sequence))
    return found


def test_statistics_are_those_of_all_tokens(finished: Manifest, truth: dict[str, Truth]) -> None:
    rows = FeatureStore.open(finished).features().to_pylist()
    assert [(row["layer"], row["feature"]) for row in rows] == [
        (layer, feature) for layer in range(N_LAYERS) for feature in range(N_FEATURES)
    ]
    for row in rows:
        values = truth["train"].activations[:, :, row["layer"], row["feature"]]
        values = values[values > 0]
        assert row["n_active"] == len(values) == sum(row["histogram"])
        assert row["density"] == pytest.approx(len(values) / truth["train"].n_tokens)
        if (row["layer"], row["feature"]) == DEAD:
            assert (row["act_max"], row["act_mean"], row["quantile_values"]) == (0, 0, [])
            continue
        assert row["act_max"] == pytest.approx(float(values.max()), rel=1e-6)
        assert row["act_mean"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert len(row["quantile_values"]) == 99 and len(row["histogram_edges"]) == len(row["histogram"]) + 1
        assert row["histogram_edges"][-1] >= row["act_max"]
        middle = row["quantile_values"][49]
        bin_width = float(values.max()) / 256
        assert (values < middle - bin_width).double().mean() <= 0.5 <= (values <= middle + bin_width).double().mean()


def test_windows_hold_what_the_features_did_there(finished: Manifest, truth: dict[str, Truth]) -> None:
    store = FeatureStore.open(finished)
    kinds = set()
    for block in store.blocks:
        for row in store.windows(block).to_pylist():
            kinds.add((row["split"], row["kind"]))
            data = truth[row["split"]]
            part = slice(row["start"], min(row["start"] + WINDOW, CONTEXT))
            values = data.activations[row["sequence"], part, row["layer"], row["feature"]]
            assert row["start"] % WINDOW == 0
            assert row["tokens"] == data.tokens[row["sequence"], part].tolist()
            assert len(row["texts"]) == len(row["tokens"]) == len(row["activations"])
            torch.testing.assert_close(torch.tensor(row["activations"]), values)
            if row["kind"] == "silent":
                assert (row["peak"], row["word"], row["before"]) == (-1, "", "") and not values.any()
            else:
                assert row["peak"] == int(values.argmax()) and values.max() > 0
            assert (row["quantile"] in (0, 25, 50, 75)) == (row["kind"] == "quantile")
    assert kinds == {(split, kind) for split in ("train", "heldout") for kind in ("top", "quantile", "silent")}


def test_top_windows_begin_with_the_strongest(finished: Manifest, truth: dict[str, Truth], cfg: FeaturesConfig) -> None:
    keys = [(layer, feature) for layer in range(N_LAYERS) for feature in range(N_FEATURES)]
    found = FeatureStore.open(finished).windows_of(keys)
    assert found[DEAD] == []
    for (layer, feature), rows in found.items():
        for split in ("train", "heldout"):
            top = [row for row in rows if (row["split"], row["kind"]) == (split, "top")]
            if not top:
                continue
            assert [row["rank"] for row in top] == list(range(len(top))) and len(top) <= cfg.top_windows
            best = [max(row["activations"]) for row in top]
            assert best == sorted(best, reverse=True)
            assert best[0] == pytest.approx(float(truth[split].activations[:, :, layer, feature].max()), rel=1e-6)
            places = {(row["kind"], row["sequence"], row["start"]) for row in rows if row["split"] == split}
            assert len(places) == sum(row["split"] == split for row in rows), "no window twice"


def test_words_are_whole_and_come_with_what_stands_before(
    finished: Manifest, truth: dict[str, Truth], tiny_model_dir: Path, cfg: FeaturesConfig
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    store, checked = FeatureStore.open(finished), 0
    for row in (row for block in store.blocks for row in store.windows(block).to_pylist()):
        if row["peak"] < 0:
            continue
        tokens = truth[row["split"]].tokens[row["sequence"]].tolist()
        here = row["start"] + row["peak"]
        documents = tokenizer.decode(tokens[: here + 1]).split("<|endoftext|>")
        text = documents[-1]
        if text.isascii() and text[-1].isalpha():
            checked += 1
            whole = (text + tokenizer.decode(tokens[here + 1 :]).split("<|endoftext|>")[0]).split(" ")
            words = text.split(" ")
            assert row["word"] == whole[len(words) - 1].split(".")[0]
            assert row["before"].split() == [word for word in words[:-1] if word][-cfg.words_before :]
    assert checked > 50


def test_logit_weights_are_the_summed_decoder_through_the_unembedding(
    finished: Manifest, upstreams: dict[str, Path], tiny_model_dir: Path, cfg: FeaturesConfig
) -> None:
    lm = load_language_model(ModelConfig(**model_options(tiny_model_dir)), toyworld=None, device=torch.device("cpu"))
    matrix = unembedding(lm.model)[: len(lm.tokenizer)]
    clt = load_clt(upstreams["train"].parent / "model")
    for row in FeatureStore.open(finished).features().to_pylist():
        vector = sum(clt.W_dec[row["layer"]][row["feature"], target] for target in range(N_LAYERS - row["layer"]))
        effect = matrix @ vector
        effect = effect - effect.mean()
        order = effect.argsort(descending=True)
        top, bottom = row["top_logits"], row["bottom_logits"]
        assert [entry["token"] for entry in top] == order[: cfg.logits].tolist()
        assert [entry["token"] for entry in bottom] == order.flip(0)[: cfg.logits].tolist()
        assert top[0]["value"] == pytest.approx(float(effect.max()), rel=1e-4)
        assert top[0]["text"] == (lm.tokenizer.decode([top[0]["token"]]).replace("\ufffd", "") or top[0]["text"])


def test_one_block_gives_the_same_as_three(
    finished: Manifest, upstreams: dict[str, Path], cfg: FeaturesConfig, tmp_path: Path
) -> None:
    whole = FeatureStore.open(run_all(dataclasses.replace(cfg, blocks=1), upstreams, tmp_path / "whole"))
    parts = FeatureStore.open(finished)
    names = ["layer", "feature", "n_active", "histogram"]
    assert whole.features(columns=names).equals(parts.features(columns=names))
    keys = [(0, 0), (1, 7), (1, 10)]
    one, two = whole.windows_of(keys), parts.windows_of(keys)
    # silent windows and samples are drawn by the feature's number in its block; the strongest are not drawn
    for key in keys:
        tops = [
            [(row["sequence"], row["start"]) for row in rows if row["kind"] == "top"] for rows in (one[key], two[key])
        ]
        assert tops[0] == tops[1]


def test_a_rerun_writes_the_same_bytes(
    finished: Manifest, upstreams: dict[str, Path], cfg: FeaturesConfig, tmp_path: Path
) -> None:
    again = features.run_unit(cfg, block="0001", **upstreams, out=tmp_path / "again")
    first = load_manifest(finished.folder / "block" / "0001" / "manifest.json", "features", "0001")
    assert again.files == first.files and again.digest == first.digest


def test_counts_and_files(finished: Manifest, truth: dict[str, Truth]) -> None:
    load_manifest(finished.folder / "manifest.json", "features").verify()
    assert set(finished.files) == {"index.parquet", "blocks.json"}
    counts = finished.counts
    assert (counts["n_layers"], counts["n_features"], counts["dead"]) == (N_LAYERS, N_FEATURES, 1)
    assert counts["tokens"] == {split: data.n_tokens for split, data in truth.items()}
    assert 0 < counts["density_of_firing"]["p50"] < 0.2
    block = json.loads((finished.folder / "block" / "0001" / "manifest.json").read_text())
    assert set(block["files"]) == {"features.parquet", "windows.parquet"}
    assert block["counts"]["features"] == [3, 7]


def test_a_budget_takes_whole_sequences(
    upstreams: dict[str, Path], truth: dict[str, Truth], cfg: FeaturesConfig, tmp_path: Path
) -> None:
    small = dataclasses.replace(cfg, max_train_tokens=200, blocks=1)
    manifest = features.run_unit(small, block="0000", **upstreams, out=tmp_path / "small")
    per_sequence = (truth["train"].tokens != 1).sum(1).cumsum()
    whole = int(per_sequence[per_sequence < 200][-1])
    assert manifest.counts["tokens"]["train"] == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 12}, "at most 11 blocks, the number of features per layer; found 12"),
        ({"window": 33}, "windows of at most 32 tokens, the length of a sequence; found 33"),
        ({"max_train_tokens": 10}, r"a budget of at least one sequence \(32 tokens\); found 10 tokens"),
    ],
)
def test_configurations_that_make_no_sense(
    upstreams: dict[str, Path], cfg: FeaturesConfig, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        features.run_unit(dataclasses.replace(cfg, **changes), block="0000", **upstreams, out=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_unknown_values_name_their_key(cfg: FeaturesConfig) -> None:
    with pytest.raises(ConfigError, match=r"a positive number; found 0\n  where: features.blocks"):
        dataclasses.replace(cfg, blocks=0)
    assert cfg.units() == ("0000", "0001", "0002")


def test_a_transcoder_of_another_model_is_refused(
    upstreams: dict[str, Path], cfg: FeaturesConfig, tmp_path: Path
) -> None:
    path = make_train(tmp_path / "train", upstreams["cache"], Transcoder(3, N_FEATURES, 16))
    with pytest.raises(ShapeError, match="expected a transcoder of 2 layers"):
        features.run_unit(cfg, block="0000", **(upstreams | {"train": path}), out=tmp_path / "out")


def test_a_cache_of_other_tokens_is_refused(
    upstreams: dict[str, Path], cfg: FeaturesConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = make_cache(tmp_path / "other", tiny_model_dir, seed=5)
    with pytest.raises(UpstreamError, match="stage cache made from the given tokenize"):
        features.run_unit(cfg, block="0000", **(upstreams | {"tokenize": other["tokenize"]}), out=tmp_path / "out")


@pytest.fixture
def copied(finished: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copied"))


def test_gather_refuses_a_missing_or_foreign_block(
    copied: Path, upstreams: dict[str, Path], cfg: FeaturesConfig
) -> None:
    manifest = copied / "block" / "0002" / "manifest.json"
    kept = manifest.read_text()
    manifest.unlink()
    with pytest.raises(UpstreamError, match="the manifest of stage features; found no such file"):
        features.run(cfg, **upstreams, out=copied)
    manifest.write_text(kept)
    with pytest.raises(UpstreamError, match="block 0000 with this run's configuration; found another"):
        features.run(dataclasses.replace(cfg, logits=3), **upstreams, out=copied)


def test_a_flipped_byte_and_a_replaced_block_are_found(
    copied: Path, upstreams: dict[str, Path], cfg: FeaturesConfig
) -> None:
    store = FeatureStore.open(load_manifest(copied / "manifest.json", "features"))
    path = copied / "block" / "0000" / "windows.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"whose checksums match; found other bytes.*\n.*windows.parquet"):
        store.windows("0000")
    other = features.run_unit(
        dataclasses.replace(cfg, seed=9), block="0001", **upstreams, out=copied / "block" / "0001"
    )
    with pytest.raises(UpstreamError, match=f"block 0001 with digest .*; found {other.digest[:12]}"):
        FeatureStore.open(load_manifest(copied / "manifest.json", "features"))


def test_asking_for_what_is_not_there(finished: Manifest) -> None:
    store = FeatureStore.open(finished)
    with pytest.raises(StoreError, match="a feature below 11; found layer 0, feature 11"):
        store.windows_of([(0, 11)])
    with pytest.raises(StoreError, match="one of the blocks 0000, 0001, 0002; found 0003"):
        store.windows("0003")


@pytest.fixture(scope="module")
def streamed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Upstreams without stored activations: 40 and 10 sequences, so that the last batch is not a whole one."""
    folder, model = tmp_path_factory.mktemp("streamed"), model_options(tiny_model_dir)
    text = folder / "text.txt"
    text.write_text("".join(f"{' '.join(np.random.default_rng(n).choice(WORDS, 6))} {n}.\n" for n in range(120)))
    plain = options("tokenize", "files", model=model, files=[str(text)], context=CONTEXT, heldout_fraction=0.25)
    tokenize.run(decode(TokenizeConfig, plain, "tokenize"), out=folder / "tokenize")
    paths = {"tokenize": folder / "tokenize" / "manifest.json"}
    calibrate.run(
        decode(CalibrateConfig, options("calibrate", "tiny", model=model), "calibrate"),
        **paths,
        out=folder / "calibrate",
    )
    budgets = {"train_tokens": 40 * CONTEXT, "heldout_tokens": 10 * CONTEXT}
    plain = options("cache", "tiny", model=model, mode="stream", batch_sequences=16, **budgets)
    cfg = decode(CacheConfig, plain, "cache")
    cache.run(cfg, **paths, calibrate=folder / "calibrate" / "manifest.json", out=folder / "cache")
    paths["cache"] = folder / "cache" / "manifest.json"
    transcoder = Transcoder(N_LAYERS, N_FEATURES, 16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (transcoder.W_enc, transcoder.b_enc, transcoder.b_dec, *transcoder.W_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        transcoder.log_threshold.fill_(1.0)
    return paths | {"train": make_train(folder / "train", paths["cache"], transcoder)}


def test_a_streamed_cache_gives_the_features_of_the_models_own_activations(
    streamed: dict[str, Path], cfg: FeaturesConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    manifest = features.run_unit(dataclasses.replace(cfg, blocks=1), block="0000", **streamed, out=tmp_path / "0000")
    lm = load_language_model(ModelConfig(**model_options(tiny_model_dir)), toyworld=None, device=torch.device("cpu"))
    store = TokenStore.open(load_manifest(streamed["tokenize"], "tokenize"))
    clt = load_clt(streamed["train"].parent / "model")
    grids = {}
    for split, count in (("train", 40), ("heldout", 10)):
        tokens = torch.from_numpy(store.read(split, 0, count).astype(np.int64))
        inputs = torch.cat([capture_mlp(lm, batch)[0] for batch in tokens.split(16)])
        active = clt.encode(inputs.flatten(0, 1)).detach().unflatten(0, tokens.shape)
        grids[split] = active.masked_fill((tokens == lm.bos_id)[:, :, None, None], 0.0)
        assert manifest.counts["tokens"][split] == int((tokens != lm.bos_id).sum())
    rows = pq.read_table(manifest.folder / "features.parquet").to_pylist()
    assert len(rows) == N_LAYERS * N_FEATURES
    for row in rows:
        values = grids["train"][:, :, row["layer"], row["feature"]]
        assert row["n_active"] == int((values > 0).sum())
        assert row["act_max"] == pytest.approx(float(values.max()), rel=1e-6)
    windows = pq.read_table(manifest.folder / "windows.parquet").to_pylist()
    assert {row["split"] for row in windows} == {"train", "heldout"}
    for row in windows:
        part = slice(row["start"], min(row["start"] + WINDOW, CONTEXT))
        values = grids[row["split"]][row["sequence"], part, row["layer"], row["feature"]]
        torch.testing.assert_close(torch.tensor(row["activations"]), values)
