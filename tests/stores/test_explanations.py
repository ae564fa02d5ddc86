from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from circuitmill.errors import StoreError
from circuitmill.stores.explanations import (
    EXPLANATIONS,
    FILE,
    ExplanationStore,
    explanations_table,
    repeated_or_missing,
    write_explanations,
)
from circuitmill.stores.manifest import Manifest, StageOutput
from circuitmill.stores.tokens import write_parquet


@dataclass(frozen=True)
class Options:
    blocks: int = 1


def row(layer: int, feature: int, **changes: object) -> dict:
    return {
        **{"layer": layer, "feature": feature, "explanation": f'fires on "{layer}.{feature}"', "explainer": "tokens"},
        **{"rule": "{}", "detection": 0.75, "precision": None, "recall": 0.5, "n_scored": 20},
        **{"words": ["a", "b"], "promotes": []},
        **changes,
    }


def stored(out: Path, table: list[dict] | pa.Table) -> Manifest:
    output = StageOutput("interpret", Options(), {}, out)
    if isinstance(table, pa.Table):
        write_parquet(output.path(FILE), table, 10)
    else:
        write_explanations(output.path(FILE), explanations_table(table))
    return output.finish({})


def test_rows_come_back_sorted(tmp_path: Path):
    store = ExplanationStore.open(stored(tmp_path, [row(1, 0), row(0, 5), row(0, 2)]))
    keys = zip(store.table()["layer"].to_pylist(), store.table()["feature"].to_pylist(), strict=True)
    assert list(keys) == [(0, 2), (0, 5), (1, 0)]
    assert store.get(0, 5) == row(0, 5)
    assert store.rows({(1, 0), (0, 2)}) == {(1, 0): row(1, 0), (0, 2): row(0, 2)}
    assert store.rows([]) == {}
    assert len(store) == 3


def test_nulls_stay_nulls(tmp_path: Path):
    empty = row(0, 0, rule=None, detection=None, recall=None, n_scored=0, words=[])
    assert ExplanationStore.open(stored(tmp_path, [empty])).get(0, 0) == empty


def test_an_unknown_feature_is_an_error(tmp_path: Path):
    store = ExplanationStore.open(stored(tmp_path, [row(0, 0)]))
    with pytest.raises(StoreError, match="layer 3, feature 7") as caught:
        store.get(3, 7)
    assert str(tmp_path / FILE) in str(caught.value)


def test_changed_bytes_are_an_error(tmp_path: Path):
    manifest = stored(tmp_path, [row(0, 0)])
    data = bytearray((tmp_path / FILE).read_bytes())
    data[20] ^= 4
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(StoreError, match="other bytes than were written") as caught:
        ExplanationStore.open(manifest)
    assert "run stage interpret again" in str(caught.value)


def test_other_columns_are_an_error(tmp_path: Path):
    table = pa.Table.from_pylist([row(0, 0)], EXPLANATIONS).drop_columns(["rule"])
    with pytest.raises(StoreError, match="columns layer, feature, explanation, explainer, detection"):
        ExplanationStore.open(stored(tmp_path, table))


def test_a_manifest_without_explanations_is_an_error(tmp_path: Path):
    with pytest.raises(StoreError, match=FILE):
        ExplanationStore.open(StageOutput("interpret", Options(), {}, tmp_path).finish({}))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([(0, 0), (0, 1), (1, 0), (1, 1)], None),
        ([(0, 0), (0, 1), (1, 0)], "none for 1 features, the first being layer 1, feature 1"),
        ([(0, 0), (0, 1), (1, 0), (1, 0)], "1 rows for features that have one"),
        ([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], "5 features"),
    ],
)
def test_coverage(keys: list[tuple[int, int]], problem: str | None):
    table = pa.Table.from_pylist([row(*key) for key in keys], EXPLANATIONS)
    assert repeated_or_missing(table, n_layers=2, n_features=2) == problem
