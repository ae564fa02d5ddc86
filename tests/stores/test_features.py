"""Reading features; the files are made by the tests' own hand, as formats.md describes them."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from tests.stages.small_run import Nothing

from circuitmill.errors import StoreError, UpstreamError
from circuitmill.stores.features import (
    BLOCKS,
    FEATURES,
    INDEX,
    INDEX_ROWS,
    WINDOWS,
    FeatureStore,
    block_span,
    read_checked,
)
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.tokens import write_parquet

N_FEATURES = 5


def feature(layer: int, number: int) -> dict:
    empty = {"histogram": [], "histogram_edges": [], "quantile_values": [], "top_logits": [], "bottom_logits": []}
    group = number % 2 if number != 4 else -1
    return {"layer": layer, "feature": number, "density": 0.1, "n_active": 10 * layer + number, "act_max": 1.0} | (
        empty | {"act_mean": 0.5, "row_group": group}
    )


def window(layer: int, number: int, rank: int) -> dict:
    place = {"layer": layer, "feature": number, "split": "train", "kind": "top", "rank": rank, "quantile": -1}
    data = {"sequence": rank, "start": 0, "tokens": [1], "texts": ["a"], "activations": [1.0], "peak": 0}
    return place | data | {"word": f"{layer}/{number}/{rank}", "before": ""}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two layers of five features in two blocks; feature 4 has no windows, the others two, each in its row group."""
    blocks, index = [], []
    for name, members in (("0000", [0, 1]), ("0001", [2, 3, 4])):
        keys = [(layer, number) for layer in range(2) for number in members]
        output = StageOutput("features", Nothing(), {}, tmp_path / "block" / name, unit=name)
        rows = pa.Table.from_pylist([feature(*key) for key in keys], schema=FEATURES)
        write_parquet(output.path("features.parquet"), rows, len(keys))
        held = [key for group in (0, 1) for key in keys if feature(*key)["row_group"] == group]
        table = pa.Table.from_pylist([window(*key, rank) for key in held for rank in (0, 1)], schema=WINDOWS)
        write_parquet(output.path("windows.parquet"), table, 4)
        blocks.append({"name": name, "digest": output.finish({}).digest})
        index += [{"layer": k[0], "feature": k[1], "block": name, "row_group": feature(*k)["row_group"]} for k in keys]
    output = StageOutput("features", Nothing(), {}, tmp_path, keep=("block",))
    write_parquet(output.path(INDEX), pa.Table.from_pylist(index, schema=INDEX_ROWS), len(index))
    output.path(BLOCKS).write_text(json.dumps(blocks))
    output.finish({"n_layers": 2, "n_features": N_FEATURES})
    return FeatureStore.open(load_manifest(tmp_path / "manifest.json", "features"))


def test_all_features_come_sorted_whatever_the_blocks(store: FeatureStore) -> None:
    rows = store.features().to_pylist()
    assert [(row["layer"], row["feature"]) for row in rows] == [(layer, n) for layer in range(2) for n in range(5)]
    assert [row["n_active"] for row in rows] == [10 * row["layer"] + row["feature"] for row in rows]
    assert store.features(columns=["n_active"])["n_active"].to_pylist() == [row["n_active"] for row in rows]
    assert store.features("0001", ["feature"])["feature"].to_pylist() == [2, 3, 4, 2, 3, 4]


def test_windows_of_some_features(store: FeatureStore) -> None:
    found = store.windows_of([(1, 3), (0, 0), (0, 4)])
    assert {key: [row["word"] for row in rows] for key, rows in found.items()} == {
        (1, 3): ["1/3/0", "1/3/1"],
        (0, 0): ["0/0/0", "0/0/1"],
        (0, 4): [],
    }
    assert store.windows("0000").num_rows == 8


def test_a_missing_block_is_named(store: FeatureStore) -> None:
    (store.manifest.folder / "block" / "0001" / "manifest.json").unlink()
    with pytest.raises(UpstreamError, match=r"the manifest of stage features.*no such file\n.*0001"):
        FeatureStore.open(store.manifest)


def test_a_flipped_byte_is_named(store: FeatureStore) -> None:
    path = store.manifest.folder / "block" / "0001" / "features.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"other bytes than were written\n.*0001/features.parquet"):
        store.features()


def test_a_truncated_file_is_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, pa.table({"a": list(range(1000))}), 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"a whole Parquet file.*\n.*x.parquet"):
        read_checked(path)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 7])
def test_spans_cover_every_feature_once(n_blocks: int) -> None:
    covered = [number for block in range(n_blocks) for number in range(7)[block_span(f"{block:04d}", n_blocks, 7)]]
    assert covered == list(range(7))


def test_manifest_is_of_the_whole_stage(store: FeatureStore) -> None:
    assert isinstance(store.manifest, Manifest) and store.manifest.unit is None
    assert (store.n_layers, store.n_features, store.blocks) == (2, N_FEATURES, ("0000", "0001"))
