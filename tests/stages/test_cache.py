import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stages.small_run import make_calibration, model_options, options

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.model import ModelConfig
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.errors import ConfigError, DivergedError, StoreError, UpstreamError
from circuitmill.lm import sites
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import load_language_model
from circuitmill.stages import cache, tokenize
from circuitmill.stores.activation_schema import GROUP
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.stores.tokens import TokenStore

Upstream = dict[str, Path]


@pytest.fixture(scope="module")
def tokens(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of a token store of 16-token sequences."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdefgh "), size=int(rng.integers(3, 40)))) for _ in range(120)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    cfg = TokenizeConfig(
        model=ModelConfig(source="folder", name=str(tiny_model_dir), revision="", dtype="float32"),
        source="files",
        files=(str(folder / "corpus.txt"),),
        text_field="text",
        text_unit="line",
        dataset="",
        dataset_config="",
        dataset_split="",
        dataset_revision="",
        network=False,
        context=16,
        heldout_fraction=0.25,
        max_train_tokens=None,
        max_heldout_tokens=None,
        sequences_per_file=64,
        sequences_per_group=8,
        documents_per_file=1000,
        keep_text=True,
    )
    return tokenize.run(cfg, out=folder / "out").folder / "manifest.json"


@pytest.fixture(scope="module")
def upstream(tiny_model_dir: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """Manifests of stages tokenize and calibrate."""
    out = tmp_path_factory.mktemp("calibrate")
    return {"tokenize": tokens, "calibrate": make_calibration(out, model_options(tiny_model_dir), tokens)}


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> CacheConfig:
    changes = {"train_tokens": None, "heldout_tokens": None, "batch_sequences": 4, "codec": "float32"}
    sizes = {"group_channels": 8, "chunk_bytes": 4096, "chunks_per_file": 2}
    plain = options("cache", "tiny", model=model_options(tiny_model_dir), **changes, **sizes)
    return decode(CacheConfig, plain, "cache")


@pytest.fixture(scope="module")
def store(config: CacheConfig, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The exact store of the whole corpus, for tests that only read."""
    return _run(config, upstream, tmp_path_factory.mktemp("cache"))


def _shard(config: CacheConfig, name: str, upstream: Upstream, out: Path) -> Manifest:
    return cache.run_unit(config, shard=name, **upstream, out=out / "shard" / name)


def _run(config: CacheConfig, upstream: Upstream, out: Path) -> ActivationStore:
    for name in config.units():
        _shard(config, name, upstream, out)
    cache.run(config, **upstream, out=out)
    manifest = load_manifest(out / "manifest.json", "cache")
    manifest.verify()
    return ActivationStore.open(manifest)


def _expected(config: CacheConfig, tokens: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Captured in one go, BOS left out."""
    lm = load_language_model(config.model, toyworld=None, device=torch.device("cpu"))
    store = TokenStore.open(load_manifest(tokens, "tokenize"))
    ids = store.read(split, 0, store.n_sequences(split))
    inputs, outputs = capture_mlp(lm, torch.from_numpy(ids.astype(np.int64)))
    mask = torch.from_numpy(ids != store.bos_id)
    return inputs[mask], outputs[mask], ids


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_store_holds_the_models_activations(
    store: ActivationStore, config: CacheConfig, upstream: Upstream, split: str
) -> None:
    inputs, outputs, ids = _expected(config, upstream["tokenize"], split)
    rows = store.read(split, 0, store.n_tokens(split))
    assert len(inputs) == store.n_tokens(split) == (ids != 1).sum()
    # batches of another size round differently
    torch.testing.assert_close(rows.inputs, inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.outputs, outputs, rtol=1e-4, atol=1e-5)
    assert np.array_equal(rows.token_id, ids[rows.sequence, rows.position])
    assert np.array_equal(np.stack([rows.sequence, rows.position], 1), np.argwhere(ids != 1))


def test_reading_across_shards_and_without_outputs(store: ActivationStore) -> None:
    edge = store.shards("train")[0].n_tokens
    whole = store.read("train", 0, store.n_tokens("train"))
    part = store.read("train", edge - 3, edge + 5, outputs=False)
    assert part.outputs is None
    assert torch.equal(part.inputs, whole.inputs[edge - 3 : edge + 5])
    assert np.array_equal(part.sequence, whole.sequence[edge - 3 : edge + 5])
    with pytest.raises(StoreError, match=f"tokens within 0 to {store.n_tokens('train')}"):
        store.read("train", 0, store.n_tokens("train") + 1)


def test_normalisation_comes_from_the_train_split(
    store: ActivationStore, config: CacheConfig, upstream: Upstream
) -> None:
    inputs, outputs, _ = _expected(config, upstream["tokenize"], "train")
    for x, scale, mean in (
        (inputs, store.normalization.input_scale, store.normalization.input_mean),
        (outputs, store.normalization.output_scale, store.normalization.output_mean),
    ):
        torch.testing.assert_close(scale, (16 / x.square().sum(2).mean(0)).sqrt(), rtol=1e-4, atol=0)
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-4, atol=1e-5)


def test_manifest_and_attributes(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    store = _run(dataclasses.replace(config, codec="int8"), upstream, tmp_path)
    inputs, _, _ = _expected(config, upstream["tokenize"], "heldout")
    restored = store.read("heldout", 0, len(inputs)).inputs
    assert 0 < (restored - inputs).square().sum() < 1e-4 * inputs.square().sum()
    counts = store.manifest.counts
    assert counts["tokens"] == {"train": store.n_tokens("train"), "heldout": store.n_tokens("heldout")}
    assert (counts["n_layers"], counts["d_model"]) == (2, 16)
    assert all(0 < error < 1e-4 for place in ("inputs", "outputs") for error in counts["nmse"][place])
    attributes = json.loads((tmp_path / "shard/train-00001" / GROUP / "zarr.json").read_text())["attributes"]
    assert attributes["hookpoints"] == {"inputs": "mlp.hook_in", "outputs": "mlp.hook_out"}
    assert attributes["model_digest"] == counts["model_digest"]
    assert (attributes["codec"], attributes["group_channels"], attributes["context"]) == ("int8", 8, 16)
    assert attributes["tokenizer_digest"] == load_manifest(upstream["tokenize"], "tokenize").counts["tokenizer_digest"]


@pytest.mark.parametrize("codec", ["float32", "int8", "int4", "entropy"])
def test_a_killed_shard_goes_on_to_the_same_bytes(
    config: CacheConfig, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    # chunks of 32 tokens
    config = dataclasses.replace(config, codec=codec, chunk_bytes={"float32": 4096, "int4": 512}.get(codec, 1024))
    straight = _shard(config, "train-00000", upstream, tmp_path / "straight")
    calls = []
    ledger = tmp_path / "broken" / "shard" / "train-00000" / "ledger.jsonl"

    def killed(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 8:
            # batches that wait for the writer are lost: go when a file is there
            deadline = time.monotonic() + 30
            while "file-00000" not in ledger.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return capture_mlp(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sites, "capture_mlp", killed)
        with pytest.raises(KeyboardInterrupt):
            _shard(config, "train-00000", upstream, tmp_path / "broken")
    before = len(calls)
    monkeypatch.setattr(sites, "capture_mlp", lambda *a: (calls.append(a), capture_mlp(*a))[1])
    resumed = _shard(config, "train-00000", upstream, tmp_path / "broken")
    assert resumed.digest == straight.digest and resumed.files == straight.files
    batches = -(-(straight.counts["sequences"][1] - straight.counts["sequences"][0]) // 4)
    assert len(calls) - before < batches


def test_budgets(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    limited = dataclasses.replace(config, train_tokens=100, heldout_tokens=16)
    store = _run(limited, upstream, tmp_path)
    rows = store.read("train", 0, store.n_tokens("train"))
    assert set(rows.sequence.tolist()) == set(range(7))
    there = load_manifest(upstream["tokenize"], "tokenize").counts["sequences"]["train"] * 16
    greedy = dataclasses.replace(config, train_tokens=there + 1)
    with pytest.raises(ConfigError, match=rf"at most {there} tokens(.|\n)*{there + 1}(.|\n)*cache\.train_tokens"):
        _shard(greedy, "train-00000", upstream, tmp_path / "greedy")
    many = dataclasses.replace(config, heldout_tokens=16, heldout_shards=2)
    with pytest.raises(ConfigError, match=r"at most 1 shards(.|\n)*cache\.heldout_shards"):
        _shard(many, "heldout-00000", upstream, tmp_path / "many")


def test_units_and_unknown_shard(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    assert config.units() == ("train-00000", "train-00001", "heldout-00000")
    with pytest.raises(ConfigError, match=r"train-00001(.|\n)*found train-00002(.|\n)*--shard"):
        _shard(config, "train-00002", upstream, tmp_path)


def test_gathering_needs_every_shard_of_this_configuration(
    config: CacheConfig, upstream: Upstream, tmp_path: Path
) -> None:
    _shard(config, "train-00000", upstream, tmp_path)
    with pytest.raises(UpstreamError, match=r"no such file(.|\n)*train-00001"):
        cache.run(config, **upstream, out=tmp_path)
    _shard(dataclasses.replace(config, codec="bf16"), "train-00001", upstream, tmp_path)
    _shard(config, "heldout-00000", upstream, tmp_path)
    with pytest.raises(UpstreamError, match=r"shard train-00001 with this run's configuration"):
        cache.run(config, **upstream, out=tmp_path)


def test_a_rebuilt_shard_must_be_gathered_again(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    store = _run(config, upstream, tmp_path)
    _shard(dataclasses.replace(config, codec="bf16"), "train-00001", upstream, tmp_path)
    with pytest.raises(UpstreamError, match=r"shard train-00001 with digest(.|\n)*run stage cache again"):
        ActivationStore.open(store.manifest)


def test_a_damaged_shard_is_rebuilt_alone(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    store = _run(config, upstream, tmp_path)
    before = store.read("train", 0, 40).inputs
    other = (tmp_path / "shard/train-00001/manifest.json").stat().st_mtime_ns
    path = tmp_path / "shard/train-00000" / GROUP / "inputs/values/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"train-00000.*array inputs/values, chunk 0"):
        ActivationStore.open(store.manifest).read("train", 0, 40)
    assert _shard(config, "train-00000", upstream, tmp_path).digest == store.shards("train")[0]._manifest.digest
    assert torch.equal(ActivationStore.open(store.manifest).read("train", 0, 40).inputs, before)
    assert (tmp_path / "shard/train-00001/manifest.json").stat().st_mtime_ns == other


def test_another_tokenizer_is_refused(
    config: CacheConfig, upstream: Upstream, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    other.mkdir()
    for path in tiny_model_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    # the model itself is the same, so that the calibration is its own
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(other)))
    with pytest.raises(ConfigError, match=r"the tokenizer that made the token store"):
        _shard(changed, "train-00000", upstream, tmp_path)


def test_not_finite_activations_stop_the_shard(
    config: CacheConfig, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, outputs = capture_mlp(*arguments)
        outputs[:, 1] = float("inf")
        return inputs, outputs

    monkeypatch.setattr(sites, "capture_mlp", broken)
    with pytest.raises(DivergedError, match=r"finite MLP outputs(.|\n)*layer 1"):
        _shard(config, "train-00000", upstream, tmp_path)
    assert not (tmp_path / "shard/train-00000/manifest.json").exists()


def test_a_bfloat16_model_is_stored_bit_for_bit(config: CacheConfig, upstream: Upstream, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, codec="bf16", model=dataclasses.replace(config.model, dtype="bfloat16"), batch_sequences=1000
    )
    store = _run(dataclasses.replace(config, train_shards=1), upstream, tmp_path)
    inputs, outputs, _ = _expected(config, upstream["tokenize"], "train")
    rows = store.read("train", 0, store.n_tokens("train"))
    assert inputs.dtype == torch.bfloat16
    assert torch.equal(rows.inputs, inputs.float())
    assert torch.equal(rows.outputs, outputs.float())
