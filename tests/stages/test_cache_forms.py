"""The forms a cache can have: every codec, inputs alone, nothing stored; and what it refuses to be built on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from tests.stages.small_run import make_calibration, make_tokens, model_options, options, run_cache

from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.lm.targets import MlpTargets, mlp_targets
from circuitmill.stages import cache, calibrate
from circuitmill.stores.activation_schema import GROUP
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.normalization import load_moments, load_normalization
from circuitmill.stores.tokens import TokenStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def upstream(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upstream")
    tokens = make_tokens(folder, tiny_model_dir)
    return {
        "tokenize": tokens,
        "calibrate": make_calibration(folder / "calibrate", model_options(tiny_model_dir), tokens),
    }


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> CacheConfig:
    plain = options("cache", "tiny", model=model_options(tiny_model_dir), train_tokens=None, heldout_tokens=None)
    return decode(CacheConfig, plain | {"group_channels": 16, "chunk_bytes": 2048, "chunks_per_file": 4}, "cache")


def made(config: CacheConfig, upstream: dict[str, Path], out: Path, **changes: object) -> ActivationStore:
    config = dataclasses.replace(config, **changes)
    path = run_cache(config, upstream["tokenize"], upstream["calibrate"], out)
    manifest = load_manifest(path, "cache")
    manifest.verify()
    return ActivationStore.open(manifest)


@pytest.fixture(scope="module")
def exact(config: CacheConfig, upstream: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return made(config, upstream, tmp_path_factory.mktemp("exact"), codec="float32")


@pytest.mark.parametrize(
    ("codec", "worst"), [("bf16", 1e-5), ("int8", 1e-4), ("int4", 1e-2), ("int2", 0.15), ("entropy", 1e-2)]
)
def test_what_the_manifest_says_of_a_codec_is_so(
    exact: ActivationStore, config: CacheConfig, upstream: dict[str, Path], tmp_path: Path, codec: str, worst: float
) -> None:
    store = made(config, upstream, tmp_path, codec=codec)
    counts = store.manifest.counts
    total = store.n_tokens("train")
    ours, theirs = store.read("train", 0, total), exact.read("train", 0, total)
    assert (ours.sequence == theirs.sequence).all() and (ours.token_id == theirs.token_id).all()
    for place in ("inputs", "outputs"):
        x = getattr(theirs, place)
        error = (getattr(ours, place) - x).square().sum(dim=(0, 2)) / x.square().sum(dim=(0, 2))
        assert ((error > 0) & (error < worst)).all()
        assert all(0 < value < worst for value in counts["nmse"][place])
        torch.testing.assert_close(error, torch.tensor(counts["nmse"][place]), rtol=0.4, atol=0)
    size = sum(path.stat().st_size for path in tmp_path.glob("shard/*/activations.zarr/**/*") if path.is_file())
    assert counts["bytes"] == size and counts["codec"] == codec
    values = 2 * 2 * 16 * sum(counts["tokens"].values())
    assert counts["bits_per_value"] == pytest.approx(8 * size / values, abs=1e-3)
    # normalisation is of the numbers before they were quantised
    for name in ("input_scale", "output_scale", "input_mean", "output_mean"):
        expected = getattr(exact.normalization, name)
        torch.testing.assert_close(getattr(store.normalization, name), expected, rtol=1e-5, atol=1e-6)


def test_a_cache_of_inputs_alone_has_half_the_bytes(
    config: CacheConfig, upstream: dict[str, Path], tmp_path: Path
) -> None:
    stored = made(config, upstream, tmp_path / "stored", codec="bf16")
    alone = made(config, upstream, tmp_path / "alone", codec="bf16", targets="recomputed")
    codes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("shard/*/activations.zarr/*puts/**/c/**/*"))
        for name in ("stored", "alone")
    ]
    assert 0.45 < codes[1] / codes[0] < 0.55
    assert alone.manifest.counts["bytes"] < 0.75 * stored.manifest.counts["bytes"], "the rest is metadata, at this size"
    assert set(alone.manifest.counts["nmse"]) == {"inputs"}
    assert alone.manifest.counts["bits_per_value"] == pytest.approx(
        8 * alone.manifest.counts["bytes"] / (2 * 16 * sum(alone.manifest.counts["tokens"].values())), abs=1e-3
    )
    assert alone.shards("train")[0].places == ("inputs",)
    assert torch.equal(alone.read("train", 0, 50, outputs=False).inputs, stored.read("train", 0, 50).inputs)
    assert torch.equal(alone.normalization.output_scale, stored.normalization.output_scale)


def test_a_cache_of_inputs_alone_names_the_mlps_that_make_its_outputs(
    exact: ActivationStore, config: CacheConfig, upstream: dict[str, Path], tmp_path: Path
) -> None:
    alone = made(config, upstream, tmp_path, codec="float32", targets="recomputed")
    targets: MlpTargets = mlp_targets(config.model, toyworld=None, device=CPU)
    assert alone.shards("train")[0].attributes["mlp_digest"] == targets.digest
    assert "mlp_digest" not in exact.shards("train")[0].attributes
    total = alone.n_tokens("heldout")
    computed = targets(alone.read("heldout", 0, total, outputs=False).inputs)
    torch.testing.assert_close(computed, exact.read("heldout", 0, total).outputs, rtol=1e-4, atol=1e-5)


def test_attributes_say_where_numbers_are_from(config: CacheConfig, upstream: dict[str, Path], tmp_path: Path) -> None:
    store = made(config, upstream, tmp_path, codec="entropy", bits=3.0)
    attributes = dict(zarr.open_group(tmp_path / "shard/train-00001" / GROUP, mode="r").attrs)
    assert attributes["hookpoints"] == {"inputs": "mlp.hook_in", "outputs": "mlp.hook_out"}
    assert attributes["model_digest"] == store.manifest.counts["model_digest"]
    assert attributes["calibration_digest"] == load_manifest(upstream["calibrate"], "calibrate").digest
    assert attributes["tokenizer_digest"] == load_manifest(upstream["tokenize"]).counts["tokenizer_digest"]
    assert (attributes["codec"], attributes["bits"], attributes["targets"]) == ("entropy", 3.0, "stored")
    assert (attributes["schema_version"], attributes["context"], attributes["bos_id"]) == (2, 32, 1)
    assert store.manifest.inputs == {name: load_manifest(path, name).digest for name, path in upstream.items()}


def test_fewer_bits_are_fewer_bytes(config: CacheConfig, upstream: dict[str, Path], tmp_path: Path) -> None:
    sizes = []
    for bits in (2.0, 4.0, 6.0):
        made(config, upstream, tmp_path / str(bits), codec="entropy", bits=bits, chunk_bytes=16_384)
        codes = (tmp_path / str(bits)).glob("shard/train-*/activations.zarr/*/codes/c/**/*")
        sizes.append(sum(path.stat().st_size for path in codes))
    assert sizes[0] < 0.7 * sizes[1] < 0.7 * 0.8 * sizes[2]


def other_model(folder: Path, model_dir: Path, name: str = "mlp.c_proj.weight") -> Path:
    """The same model and tokenizer, one matrix of every MLP scaled."""
    folder.mkdir()
    for path in model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    changed = {key: value * 1.5 if name in key else value for key, value in tensors.items()}
    assert any(name in key for key in tensors)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_calibration_of_another_model_is_refused(
    config: CacheConfig, upstream: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = model_options(other_model(tmp_path / "model", tiny_model_dir))
    stale = make_calibration(tmp_path / "calibrate", model, upstream["tokenize"])
    with pytest.raises(
        UpstreamError, match=r"a calibration of model(.|\n)*found one of a model(.|\n)*run stage calibrate again"
    ):
        made(config, upstream | {"calibrate": stale}, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    assert not list((tmp_path / "cache").rglob("activations.zarr"))


def test_a_calibration_of_other_tokens_is_refused(
    config: CacheConfig, upstream: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokens = make_tokens(tmp_path, tiny_model_dir, seed=9)
    with pytest.raises(UpstreamError, match="stage calibrate made from the given tokenize"):
        made(config, upstream | {"tokenize": tokens}, tmp_path / "cache")


def test_another_calibration_makes_shards_stale(
    config: CacheConfig, upstream: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    store = made(config, upstream, tmp_path / "cache")
    plain = options("calibrate", "tiny", model=model_options(tiny_model_dir), tokens=500)
    calibrate.run(decode(CalibrateConfig, plain, "calibrate"), tokenize=upstream["tokenize"], out=tmp_path / "other")
    with pytest.raises(UpstreamError, match=r"shard train-00000 with this run's upstream digests"):
        cache.run(
            config,
            tokenize=upstream["tokenize"],
            calibrate=tmp_path / "other" / "manifest.json",
            out=store.manifest.folder,
        )


def test_streaming_writes_the_calibrations_normalisation_and_counts_tokens(
    config: CacheConfig, upstream: dict[str, Path], tmp_path: Path
) -> None:
    streamed = dataclasses.replace(config, mode="stream", train_tokens=20 * 32 - 5)
    manifest = cache.run(streamed, **upstream, out=tmp_path)
    manifest.verify()
    assert set(manifest.files) == {"normalization.safetensors"}
    store = TokenStore.open(load_manifest(upstream["tokenize"], "tokenize"))
    calibrated = load_manifest(upstream["calibrate"], "calibrate")
    assert manifest.counts == {
        "tokens": {
            "train": int((store.read("train", 0, 20) != 1).sum()),
            "heldout": int((store.read("heldout", 0, store.n_sequences("heldout")) != 1).sum()),
        },
        "hookpoint": "mlp",
        "places": ["mlp.0", "mlp.1"],
        "n_layers": 2,
        "d_model": 16,
        "model_digest": calibrated.counts["model_digest"],
        "bytes": 0,
    }
    inputs, outputs = load_moments(calibrated.folder / "moments.safetensors")
    normalization = load_normalization(tmp_path / "normalization.safetensors")
    for scale, mean, moments in (
        (normalization.input_scale, normalization.input_mean, inputs),
        (normalization.output_scale, normalization.output_mean, outputs),
    ):
        expected = (16 * moments.count / moments.sum_squares).sqrt()
        torch.testing.assert_close(scale, expected.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean, moments.mean.float(), rtol=1e-6, atol=0)


def test_streaming_needs_the_tokens_it_counts_on(
    config: CacheConfig, upstream: dict[str, Path], tmp_path: Path
) -> None:
    greedy = dataclasses.replace(config, mode="stream", train_tokens=10**9)
    with pytest.raises(ConfigError, match=r"cache\.train_tokens"):
        cache.run(greedy, **upstream, out=tmp_path)


def test_streaming_clears_what_lists_shards_and_leaves_them(
    config: CacheConfig, upstream: dict[str, Path], tmp_path: Path
) -> None:
    made(config, upstream, tmp_path)
    listed = json.loads((tmp_path / "shards.json").read_text())
    assert [entry["name"] for entry in listed] == list(config.units())
    cache.run(dataclasses.replace(config, mode="stream"), **upstream, out=tmp_path)
    assert not (tmp_path / "shards.json").exists() and (tmp_path / "shard" / "train-00000").is_dir()
