"""The tables of features: what is written is what `FeatureStore` reads."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from circuitmill.core.block import LogitWeights
from circuitmill.core.collect import Collector
from circuitmill.errors import StoreError
from circuitmill.stores.feature_windows import WindowRows
from circuitmill.stores.feature_writer import (
    features_table,
    window_tables,
    with_row_groups,
    write_index,
    write_windows,
)
from circuitmill.stores.features import FEATURES, INDEX_ROWS, WINDOWS
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.tokens import write_parquet

TEXTS = ["<pad>", "<bos>", " a", "b", " c"]


def rows_of(split: str, features: list[int]) -> WindowRows:
    """Two windows per feature; the second is one token long."""
    feature = np.repeat(features, 2)
    n = len(feature)
    return WindowRows(
        split=split,
        feature=feature,
        kind=["top", "silent"] * (n // 2),
        rank=np.zeros(n, dtype=np.int64),
        quantile=np.full(n, -1),
        sequence=np.arange(n),
        start=np.full(n, 8),
        length=np.tile([3, 1], n // 2),
        tokens=np.tile(np.array([[1, 2, 3]], dtype=np.int32), (n, 1)),
        activations=np.tile(np.array([[0.0, 1.5, 0.0]], dtype=np.float32), (n, 1)),
        peak=np.tile([1, -1], n // 2),
        word=["ab", ""] * (n // 2),
        before=["c a", ""] * (n // 2),
    )


def test_windows_come_in_order_and_without_padding(tmp_path: Path) -> None:
    # 300 features: 150 of each of two layers, numbers 500 to 649; feature 130 of the block begins a row group
    splits = [rows_of("train", [0, 149, 150, 299]), rows_of("heldout", [0, 150])]
    groups = write_windows(tmp_path / "w.parquet", window_tables(splits, TEXTS, 300, first=500, per_layer=150))
    assert groups == [0, -1, 1, -1, 2]
    table = pq.read_table(tmp_path / "w.parquet")
    assert table.schema.equals(WINDOWS)
    rows = table.to_pylist()
    places = [(row["layer"], row["feature"], row["split"]) for row in rows][::2]
    assert places == [
        (0, 500, "train"),
        (0, 500, "heldout"),
        (0, 649, "train"),
        (1, 500, "train"),
        (1, 500, "heldout"),
        (1, 649, "train"),
    ]
    assert (rows[0]["tokens"], rows[0]["texts"]) == ([1, 2, 3], ["<bos>", " a", "b"])
    assert (rows[1]["tokens"], rows[1]["texts"], rows[1]["activations"]) == ([1], ["<bos>"], [0.0])
    file = pq.ParquetFile(tmp_path / "w.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(3)] == [4, 6, 2]


def statistics() -> Collector:
    collector = Collector(4, top=1, quantile=0, silent=0, seed=0)
    a = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    collector.update(a, torch.arange(2), torch.arange(2))
    return collector


def test_statistics_of_dead_and_living_features() -> None:
    weights = LogitWeights(
        top=torch.tensor([[2.0, 1.0]] * 4),
        top_tokens=torch.tensor([[2, 3]] * 4),
        bottom=torch.tensor([[-2.0, -1.0]] * 4),
        bottom_tokens=torch.tensor([[4, 3]] * 4),
    )
    table = features_table(statistics(), weights, TEXTS, first=6, per_layer=2, n_bars=8)
    assert table.schema.equals(FEATURES)
    rows = with_row_groups(table, [0], np.array([False, True, False, True])).to_pylist()
    assert [(row["layer"], row["feature"]) for row in rows] == [(0, 6), (0, 7), (1, 6), (1, 7)]
    assert [row["density"] for row in rows] == [0.0, 0.5, 0.0, 1.0]
    assert [row["row_group"] for row in rows] == [-1, 0, -1, 0]
    assert (rows[3]["act_mean"], rows[3]["act_max"], sum(rows[3]["histogram"])) == (2.0, 3.0, 2)
    assert rows[0]["histogram"] == rows[0]["quantile_values"] == []
    assert rows[0]["top_logits"][0] == {"token": 2, "text": " a", "value": 2.0}
    assert rows[0]["bottom_logits"][0] == {"token": 4, "text": " c", "value": -2.0}


def block(folder: Path, features: list[int]) -> Manifest:
    """A manifest over a features table with these features of two layers."""
    folder.mkdir()
    rows = len(features)
    columns = {
        "layer": np.repeat([0, 1], rows),
        "feature": features * 2,
        "row_group": [-1] * (2 * rows),
        "density": [0.5] * (2 * rows),
    }
    write_parquet(folder / "features.parquet", pa.table(columns), max(2 * rows, 1))
    files = {"features.parquet": {"bytes": 0, "sha256": ""}}
    return Manifest("features", folder.name, 1, {}, {}, {}, files, folder)


def test_the_index_covers_every_feature_once(tmp_path: Path) -> None:
    blocks = {"0000": block(tmp_path / "0000", [0, 1]), "0001": block(tmp_path / "0001", [2])}
    density = write_index(blocks, tmp_path / "index.parquet", tmp_path / "blocks.json", 2, 3)
    assert density.tolist() == [0.5] * 6
    index = pq.read_table(tmp_path / "index.parquet")
    assert index.schema.equals(INDEX_ROWS)
    assert index["feature"].to_pylist() == [0, 1, 2, 0, 1, 2]
    assert index["block"].to_pylist() == ["0000", "0000", "0001"] * 2


@pytest.mark.parametrize(("second", "found"), [([1, 2], "8 rows for 6 features"), ([], "4 rows for 4 features")])
def test_blocks_that_overlap_or_leave_features_out_are_refused(tmp_path: Path, second: list[int], found: str) -> None:
    blocks = {"0000": block(tmp_path / "0000", [0, 1]), "0001": block(tmp_path / "0001", second)}
    with pytest.raises(StoreError, match=f"2 x 3 features, each in one block; found {found}"):
        write_index(blocks, tmp_path / "index.parquet", tmp_path / "blocks.json", 2, 3)
    assert not (tmp_path / "index.parquet").exists()
