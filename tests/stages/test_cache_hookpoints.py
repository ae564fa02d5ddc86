"""Caches of other hookpoints than the MLPs', of some layers, and of two models: stored and streamed."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from tests.stages.small_run import CONTEXT, Nothing, make_tokens, model_options, options

from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.decode import decode
from circuitmill.core.calibration import channel_constants
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.lm.live import LiveActivations
from circuitmill.lm.load import load_language_model
from circuitmill.lm.sites import capture_sites, load_sites
from circuitmill.lm.stream import ExpectedModel, LiveBlocks
from circuitmill.stages import cache, calibrate
from circuitmill.stores.activation_schema import GROUP
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.calibration import Calibration
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.normalization import load_moments
from circuitmill.stores.tokens import TokenStore
from circuitmill.stores.verify import verify
from circuitmill.training.batches import Batches

CPU = torch.device("cpu")
EMBEDDED = {"source": "toyworld", "name": "toyworld", "revision": "", "dtype": "float32"}
EARLY = EMBEDDED | {"name": "toyworld-early"}
SIZES = {"train_tokens": None, "heldout_tokens": None, "group_channels": 16, "chunk_bytes": 2048, "chunks_per_file": 4}


@pytest.fixture(scope="module")
def world(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a stage toyworld that kept a snapshot."""
    output = StageOutput("toyworld", Nothing(), {}, tmp_path_factory.mktemp("run") / "toyworld")
    for name in ("model", "early"):
        shutil.copytree(tiny_model_dir, output.path(name))
    weights = output.path("early", "model.safetensors")
    tensors = load_file(weights)
    changed = {name: value * (0.7 if "weight" in name else 1) for name, value in tensors.items()}
    save_file(changed, weights, metadata={"format": "pt"})
    return output.finish({}).folder / "manifest.json"


@pytest.fixture(scope="module")
def upstream(world: Path) -> dict[str, Path]:
    """Manifests of stages toyworld and tokenize."""
    return {"toyworld": world, "tokenize": make_tokens(world.parent.parent, world.parent / "model")}


def configs(**changes: object) -> tuple[CacheConfig, CalibrateConfig]:
    """Of the two stages, which agree; `codec` and `mode` are of one of them."""
    chosen = {"model": EMBEDDED, "hookpoint": "resid_post", "targets": "inputs", **changes}
    followed = {key: chosen[key] for key in ("model", "hookpoint", "layers", "second_model") if key in chosen}
    return (
        decode(CacheConfig, options("cache", "tiny", **(SIZES | {"codec": "float32"} | chosen)), "cache"),
        decode(CalibrateConfig, options("calibrate", "tiny", **followed), "calibrate"),
    )


def made(upstream: dict[str, Path], out: Path, **changes: object) -> Manifest:
    """Stages calibrate and cache."""
    cfg, calibration = configs(**changes)
    calibrate.run(calibration, **upstream, out=out / "calibrate")
    inputs = upstream | {"calibrate": out / "calibrate" / "manifest.json"}
    for shard in cfg.units():
        cache.run_unit(cfg, shard=shard, **inputs, out=out / "cache" / "shard" / shard)
    return cache.run(cfg, **inputs, out=out / "cache")


@pytest.fixture(scope="module")
def resid(upstream: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The residual stream behind the second block, exact."""
    return made(upstream, tmp_path_factory.mktemp("resid"), layers=[1])


@pytest.fixture(scope="module")
def two(upstream: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The stream in front of both blocks, of two models."""
    return made(upstream, tmp_path_factory.mktemp("two"), hookpoint="resid_pre", second_model=EARLY)


def expected(upstream: dict[str, Path], split: str, hookpoint: str, layers: list[int], *models: str) -> torch.Tensor:
    """Captured in one go, BOS left out."""
    store = TokenStore.open(load_manifest(upstream["tokenize"], "tokenize"))
    ids = torch.from_numpy(store.read(split, 0, store.n_sequences(split)).astype(np.int64))
    parts = []
    for name in models:
        options_of = model_options(upstream["toyworld"].parent / name)
        lm = load_language_model(configs(model=options_of)[0].model, toyworld=None, device=CPU)
        parts.append(capture_sites(lm, ids, hookpoint, layers)[ids != store.bos_id])
    return torch.cat(parts, dim=1)


def test_a_cache_of_some_layers_of_the_residual_stream(resid: Manifest, upstream: dict[str, Path]) -> None:
    store = ActivationStore.open(resid)
    for split in ("train", "heldout"):
        x = expected(upstream, split, "resid_post", [1], "model")
        found = store.read(split, 0, store.n_tokens(split), outputs=False)
        assert found.inputs.shape == (store.n_tokens(split), 1, 16) and found.outputs is None
        torch.testing.assert_close(found.inputs, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(StoreError, match="stored outputs; found a cache of inputs alone"):
        store.read("train", 0, 5)


def test_places_of_two_models_follow_each_other(two: Manifest, upstream: dict[str, Path]) -> None:
    store = ActivationStore.open(two)
    found = store.read("train", 0, store.n_tokens("train"), outputs=False).inputs
    x = expected(upstream, "train", "resid_pre", [0, 1], "model", "early")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert (x[:, :2] - x[:, 2:]).abs().amax(dim=(0, 2)).min() > 0.01
    counts = two.counts
    assert counts["places"] == ["resid_pre.0", "resid_pre.1", "second.resid_pre.0", "second.resid_pre.1"]
    assert (counts["n_layers"], counts["hookpoint"]) == (4, "resid_pre")
    digests = [
        load_language_model(
            configs(model=model_options(upstream["toyworld"].parent / name))[0].model, toyworld=None, device=CPU
        ).digest
        for name in ("model", "early")
    ]
    assert [counts["model_digest"], counts["second_model_digest"]] == digests and digests[0] != digests[1]
    attributes = dict(zarr.open_group(two.folder / "shard/train-00001" / GROUP, mode="r").attrs)
    assert attributes["hookpoints"] == {"inputs": "hook_resid_pre"} and attributes["places"] == counts["places"]
    assert (attributes["targets"], attributes["hookpoint"]) == ("inputs", "resid_pre")
    assert (attributes["second_model"], attributes["second_model_digest"]) == ("toyworld-early", digests[1])


def test_both_sides_of_the_normalisation_are_of_the_inputs(resid: Manifest, upstream: dict[str, Path]) -> None:
    x = expected(upstream, "train", "resid_post", [1], "model")
    found = ActivationStore.open(resid).normalization
    torch.testing.assert_close(found.input_scale, (16 / x.square().sum(2).mean(0)).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.input_mean, x.mean(0), rtol=1e-4, atol=1e-5)
    for name in ("scale", "mean", "std"):
        assert torch.equal(getattr(found, f"output_{name}"), getattr(found, f"input_{name}"))


def test_the_trainer_gets_what_is_read_twice(resid: Manifest) -> None:
    store = ActivationStore.open(resid)
    with store.batches(seed=0, batch_tokens=64, pool_tokens=500) as source:
        stored = source.batch(2)
        scaling = store.normalization.scaling("standardize")
        with Batches(source, scaling, device=CPU, reproduces=True) as batches:
            x, y = batches.get(2)
    assert stored.outputs is None
    assert torch.equal(x, y) and torch.equal(x, scaling.inputs(stored.inputs.decode()))
    assert x.shape == (64, 1, 16)


def test_codes_and_what_the_manifest_says_of_them(upstream: dict[str, Path], tmp_path: Path) -> None:
    manifest = made(upstream, tmp_path, hookpoint="attn_out", codec="int8")
    store = ActivationStore.open(manifest)
    x = expected(upstream, "heldout", "attn_out", [0, 1], "model")
    found = store.read("heldout", 0, len(x), outputs=False).inputs
    assert 0 < (found - x).square().sum() < 1e-3 * x.square().sum()
    assert set(manifest.counts["nmse"]) == {"inputs"} and all(0 < e < 1e-3 for e in manifest.counts["nmse"]["inputs"])
    values = 2 * 16 * sum(manifest.counts["tokens"].values())
    assert manifest.counts["bits_per_value"] == pytest.approx(8 * manifest.counts["bytes"] / values, abs=1e-3)


def test_the_calibration_is_of_the_same_places(two: Manifest, upstream: dict[str, Path]) -> None:
    calibrated = load_manifest(two.folder.parent / "calibrate" / "manifest.json", "calibrate")
    for key in ("hookpoint", "places", "n_layers", "d_model", "model_digest", "second_model_digest"):
        assert calibrated.counts[key] == two.counts[key]
    read = Calibration.load(calibrated)
    assert list(read.places) == ["inputs"]
    assert read.places["inputs"].center.shape == (4, 16)
    one, other = load_moments(calibrated.folder / "moments.safetensors")
    assert torch.equal(one.mean, other.mean) and torch.equal(one.m2, other.m2)
    x = expected(upstream, "train", "resid_pre", [0, 1], "model", "early")
    center, _ = channel_constants(x)
    distance = (read.places["inputs"].center - center).abs() / read.places["inputs"].scale
    assert distance.median() < 0.2, "a sample of the same numbers"


def test_a_calibration_in_one_batch(upstream: dict[str, Path], tmp_path: Path) -> None:
    _, cfg = configs()
    calibrate.run(dataclasses.replace(cfg, tokens=3 * CONTEXT, batch_sequences=8), **upstream, out=tmp_path)
    inputs, outputs = load_moments(tmp_path / "moments.safetensors")
    assert inputs.count > CONTEXT and torch.equal(inputs.mean, outputs.mean) and torch.equal(inputs.m2, outputs.m2)


def test_a_killed_shard_goes_on_to_the_same_bytes(
    two: Manifest, upstream: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _ = configs(hookpoint="resid_pre", second_model=EARLY)
    inputs = upstream | {"calibrate": two.folder.parent / "calibrate" / "manifest.json"}
    appended = []

    def killed(self: cache.ShardWriter, *sides: torch.Tensor) -> None:
        if len(appended) == 3:
            # what waits is written, then nothing more
            self._stop(drop=False)
            raise KeyboardInterrupt
        appended.append(sides)
        append(self, *sides)

    append = cache.ShardWriter.append
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.ShardWriter, "append", killed)
        cache.run_unit(cfg, shard="train-00000", **inputs, out=tmp_path)
    assert "file-00000" in (tmp_path / "ledger.jsonl").read_text()
    again = cache.run_unit(cfg, shard="train-00000", **inputs, out=tmp_path)
    whole = load_manifest(two.folder / "shard" / "train-00000" / "manifest.json", "cache", "train-00000")
    assert again.files == whole.files and again.digest == whole.digest


def test_verify_reads_every_byte(two: Manifest, upstream: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, folder in (
        ("toyworld", upstream["toyworld"].parent),
        ("tokenize", upstream["tokenize"].parent),
        ("calibrate", two.folder.parent / "calibrate"),
        ("cache", two.folder),
    ):
        shutil.copytree(folder, run / name)
    report = verify(run)
    assert report.problems == () and len(report.manifests) == 3 + 1 + len(configs()[0].units())
    path = run / "cache/shard/train-00000" / GROUP / "inputs/values/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content)
    (problem,) = verify(run).problems
    assert problem.path == path
    path.unlink()
    (problem,) = verify(run).problems
    assert problem.found == "no such file"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("hookpoint", {"hookpoint": "resid_mid"}),
        ("layers", {"layers": None}),
        ("second_model", {"second_model": EARLY}),
    ],
)
@pytest.mark.parametrize("mode", ["disk", "stream"])
def test_a_calibration_of_other_activations_is_refused(
    resid: Manifest, upstream: dict[str, Path], tmp_path: Path, mode: str, key: str, changes: dict
) -> None:
    cfg, _ = configs(**({"layers": [1], "mode": mode} | changes))
    inputs = upstream | {"calibrate": resid.folder.parent / "calibrate" / "manifest.json"}
    with pytest.raises(UpstreamError, match=rf"a calibration with {key} (.|\n)*run stage calibrate again"):
        if mode == "disk":
            cache.run_unit(cfg, shard="train-00000", **inputs, out=tmp_path)
        else:
            cache.run(cfg, **inputs, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_second_model_than_the_calibrated_one(two: Manifest, upstream: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "toyworld"
    shutil.copytree(upstream["toyworld"].parent, run)
    weights = run / "early" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    cfg, _ = configs(hookpoint="resid_pre", second_model=EARLY)
    inputs = upstream | {
        "toyworld": run / "manifest.json",
        "calibrate": two.folder.parent / "calibrate" / "manifest.json",
    }
    with pytest.raises(UpstreamError, match=r"a calibration of model toyworld-early (.|\n)*run stage calibrate again"):
        cache.run_unit(cfg, shard="train-00000", **inputs, out=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("activations.zarr"))


def test_hookpoints_and_layers_that_the_model_does_not_have(upstream: dict[str, Path], tmp_path: Path) -> None:
    _, cfg = configs(layers=[0, 2])
    with pytest.raises(ConfigError, match=r"layers from 0 to 1, which model toyworld has; found 2"):
        calibrate.run(cfg, **upstream, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_second_model_of_another_tokenizer(upstream: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(upstream["toyworld"].parent / "early", tmp_path / "other"))
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    _, cfg = configs(second_model=model_options(other))
    with pytest.raises(ConfigError, match=rf"one tokenizer: that of toyworld is(.|\n)*of {other}\n"):
        calibrate.run(cfg, **upstream, out=tmp_path / "out")


class Direct:
    """Blocks of two models, captured in this process."""

    def __init__(self, blocks: LiveBlocks, cfg: CacheConfig, world: Path) -> None:
        sites = load_sites(cfg, toyworld=world, device=CPU)
        self.codec, self.channels, self.sizes, self.strata = blocks.codec, blocks.channels, blocks.sizes, blocks.strata
        self.rows = []
        for number in range(blocks.n_blocks):
            tokens = torch.from_numpy(blocks.sequences(number).astype(np.int64))
            self.rows.append({("inputs", "values"): sites(tokens, tokens != 1)[0].contiguous().numpy()})

    def read(self, block: int) -> dict:
        return self.rows[block]


@pytest.mark.parametrize("changes", [{"layers": [0]}, {"second_model": EARLY}], ids=["one", "two"])
def test_streamed_batches_are_those_of_the_models(upstream: dict[str, Path], tmp_path: Path, changes: dict) -> None:
    manifest = made(upstream, tmp_path, mode="stream", batch_sequences=9, train_tokens=40 * CONTEXT, **changes)
    assert set(manifest.files) == {"normalization.safetensors"}
    cfg, store = (
        decode(CacheConfig, manifest.config, "cache"),
        TokenStore.open(load_manifest(upstream["tokenize"], "tokenize")),
    )
    folder = upstream["toyworld"].parent
    model = ExpectedModel.of(cfg, manifest.counts, toyworld=folder, device=CPU)
    tokens = store.read("train", 0, cfg.n_sequences("train", store.n_sequences("train"), store.context))
    assert len(tokens) == 40
    with pytest.raises(ConfigError, match=r"inputs alone with hookpoint resid_post(.|\n)*cache\.targets"):
        LiveBlocks(model, tokens, bos_id=1, batch_sequences=9)
    live = LiveBlocks(model, tokens, bos_id=1, batch_sequences=9, outputs=False, threads=1)
    direct = Direct(live, cfg, folder)
    order = {"seed": 1, "batch_tokens": 64, "pool_tokens": 300}
    with BatchSource(live, **order) as ours, BatchSource(direct, **order) as theirs, live:
        for index in (0, 5, 3):
            found, exact = ours.batch(index), theirs.batch(index)
            assert found.outputs is None
            assert found.inputs.decode().shape == (64, len(manifest.counts["places"]), 16)
            assert torch.equal(found.inputs.decode(), exact.inputs.decode())


@pytest.mark.slow
def test_a_stream_of_another_second_model_than_the_calibrated_one(upstream: dict[str, Path], tmp_path: Path) -> None:
    manifest = made(upstream, tmp_path, mode="stream", second_model=EARLY)
    cfg, folder = decode(CacheConfig, manifest.config, "cache"), upstream["toyworld"].parent
    model = ExpectedModel.of(cfg, manifest.counts | {"second_model_digest": "0" * 64}, toyworld=folder, device=CPU)
    tokens = np.full((4, CONTEXT), 5, dtype=np.int32)
    blocks = LiveBlocks(model, tokens, bos_id=1, batch_sequences=2, outputs=False)
    with blocks, pytest.raises(UpstreamError, match="and 000000000000 of 4 layers and d_model 16"):
        blocks.read(0)


def test_live_rows_are_those_of_the_store(two: Manifest, upstream: dict[str, Path]) -> None:
    cfg = decode(CacheConfig, two.config, "cache")
    store, tokens = ActivationStore.open(two), TokenStore.open(load_manifest(upstream["tokenize"], "tokenize"))
    live = LiveActivations(
        load_sites(cfg, toyworld=upstream["toyworld"].parent, device=CPU),
        {"heldout": tokens.read("heldout", 0, tokens.n_sequences("heldout"))},
        bos_id=1,
        batch_sequences=cfg.batch_sequences,
        manifest=two,
    )
    found, exact = (rows.read("heldout", 7, 300, outputs=False) for rows in (live, store))
    assert torch.equal(found.inputs, exact.inputs) and found.outputs is None
    assert np.array_equal(found.sequence, exact.sequence) and np.array_equal(found.token_id, exact.token_id)
    with pytest.raises(StoreError, match="outputs asked for"):
        live.read("heldout", 0, 5)
