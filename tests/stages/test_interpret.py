import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tests.conftest import REPOSITORY
from tests.stages.planted_features import N_BLOCKS, N_FEATURES, N_LAYERS, make_features, manifest_path

from circuitmill.config.compose import load_run
from circuitmill.config.decode import decode
from circuitmill.config.interpret import InterpretConfig
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.stages import interpret
from circuitmill.stores.explanations import EXPLANATIONS, ExplanationStore
from circuitmill.stores.manifest import NAME, Manifest, load_manifest


def options(name: str = "default", **changes: object) -> dict:
    data = yaml.safe_load((REPOSITORY / f"config/interpret/{name}.yaml").read_text())
    return {**data, "blocks": N_BLOCKS, **changes}


def config(**changes: object) -> InterpretConfig:
    return decode(InterpretConfig, options(**changes), "interpret")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the manifest of stage features."""
    return manifest_path(make_features(tmp_path_factory.mktemp("features")))


def run_all(features: Path, out: Path, cfg: InterpretConfig | None = None) -> Manifest:
    cfg = cfg or config()
    for block in cfg.units():
        interpret.run_unit(cfg, block=block, features=features, out=out / "block" / block)
    return interpret.run(cfg, features=features, out=out)


@pytest.fixture(scope="module")
def finished(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return run_all(features, tmp_path_factory.mktemp("interpret"))


@pytest.fixture
def copied(finished: Manifest, tmp_path: Path) -> Path:
    """A copy of the finished stage, to be damaged."""
    return shutil.copytree(finished.folder, tmp_path / "interpret")


def test_every_feature_is_explained_by_its_cause(finished: Manifest):
    store = ExplanationStore.open(finished)
    assert len(store) == N_LAYERS * N_FEATURES
    assert store.get(0, 0)["explanation"] == 'fires on numbers; promotes " Texas"'
    assert store.get(0, 1)["explanation"] == 'fires on "of"; promotes " Texas"'
    assert store.get(0, 1)["words"] == ["of"]
    assert store.get(0, 1)["promotes"] == [" Texas"]
    assert store.get(1, 1)["detection"] >= 0.95
    assert store.get(1, 1)["n_scored"] == 16


def test_a_feature_that_hardly_fires_is_not_explained(finished: Manifest):
    dead, rare = ExplanationStore.open(finished).get(1, 3), ExplanationStore.open(finished).get(1, 2)
    assert dead["explanation"] == "dead: never fires in 50,000 tokens"
    assert rare["explanation"].startswith("rare: fires on 1 of 50,000 tokens")
    for row in (dead, rare):
        assert (row["rule"], row["detection"], row["precision"], row["recall"], row["n_scored"]) == (*[None] * 4, 0)


def test_counts_and_summary(finished: Manifest):
    counts = finished.counts
    assert {key: counts[key] for key in ("features", "explained", "dead", "rare", "scored")} == {
        **{"features": 8, "explained": 6, "dead": 1, "rare": 1, "scored": 6}
    }
    assert counts["detection_median"] >= 0.95
    assert counts["share_from_70"] == counts["share_from_80"] == 1.0
    summary = json.loads(finished.file("summary.json").read_text())
    assert [layer["explained"] for layer in summary.pop("per_layer")] == [4, 2]
    assert summary == counts


def test_the_manifest_covers_what_was_written(finished: Manifest):
    loaded = load_manifest(finished.folder / NAME, "interpret")
    loaded.verify()
    assert sorted(loaded.files) == ["explanations.parquet", "summary.json"]
    assert pq.read_schema(loaded.file("explanations.parquet")).equals(EXPLANATIONS)


def test_again_gives_the_same_bytes(finished: Manifest, features: Path, tmp_path: Path):
    assert run_all(features, tmp_path).files == finished.files


def test_units_are_those_of_features():
    run = load_run("tiny", ["features.blocks=3"])
    assert run.config("interpret", "main").units() == run.config("features", "main").units()
    assert run.config("interpret", "main").units() == ("0000", "0001", "0002")


def test_other_blocks_than_those_of_features_are_refused(features: Path, tmp_path: Path):
    with pytest.raises(UpstreamError, match="interpret.blocks; found 2 blocks"):
        interpret.run_unit(config(blocks=3), block="0000", features=features, out=tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_missing_block_is_an_error(features: Path, copied: Path):
    (copied / "block" / "0001" / NAME).unlink()
    with pytest.raises(UpstreamError, match="block/0001/manifest.json"):
        interpret.run(config(), features=features, out=copied)
    assert (copied / NAME).exists()


def test_a_block_of_another_configuration_is_an_error(features: Path, copied: Path):
    other = config(tokens={**options()["tokens"], "cost": 9.0})
    with pytest.raises(UpstreamError, match="block 0000 with this run's configuration"):
        interpret.run(other, features=features, out=copied)


def test_blocks_of_other_features_are_an_error(copied: Path, tmp_path: Path):
    other = make_features(tmp_path / "features", n_tokens=60_000)
    with pytest.raises(UpstreamError, match="block 0000 with this run's features"):
        interpret.run(config(), features=manifest_path(other), out=copied)


def test_a_flipped_byte_is_an_error(features: Path, copied: Path):
    path = copied / "block" / "0000" / "explanations.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="other bytes than were written"):
        interpret.run(config(), features=features, out=copied)


def test_a_truncated_windows_file_is_an_error(features: Path, tmp_path: Path):
    other = shutil.copytree(features.parent, tmp_path / "features")
    path = other / "block" / "0000" / "windows.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UpstreamError, match="windows.parquet"):
        interpret.run_unit(config(), block="0000", features=other / NAME, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_option_files_are_complete(name: str):
    assert decode(InterpretConfig, options(name), "interpret").explainer == "tokens"
    assert yaml.safe_load((REPOSITORY / f"config/interpret/{name}.yaml").read_text())["blocks"] == "${features.blocks}"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"explainer": "llm"}, "interpret.explainer"),
        ({"blocks": 0}, "interpret.blocks"),
        ({"detection": {"min_windows": 0}}, "interpret.detection.min_windows"),
        ({"tokens": {**options()["tokens"], "min_gain": 1.5}}, "interpret.tokens.min_gain"),
        ({"tokens": {**options()["tokens"], "costs": 1.0}}, "nearest valid key: interpret.tokens.cost"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict, key: str):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        config(**changes)
