import json
from pathlib import Path

import pytest
from circuit_tracer.frontend.feature_models import Model

from circuitmill.errors import StoreError
from circuitmill.stores.graphs import (
    cantor,
    feature_document,
    graph_features,
    read_graph,
    rounded,
    write_index,
    write_json,
)

ROW = {
    "layer": 1,
    "feature": 5,
    "density": 0.0123456789,
    "act_max": 3.0,
    "histogram": [4, 2, 1],
    "histogram_edges": [0.0, 1.0, 2.0, 3.0],
    "quantile_values": [0.5, 1.0],
    "top_logits": [{"token": 3, "text": " Texas", "value": 2.0}, {"token": 4, "text": "“", "value": 1.0}],
    "bottom_logits": [{"token": 9, "text": "\n", "value": -1.0}],
}


def window(kind: str, rank: int, quantile: int = -1, split: str = "train") -> dict:
    return {
        "split": split,
        "kind": kind,
        "rank": rank,
        "quantile": quantile,
        "texts": ["in", " Dallas", f" {rank}"],
        "activations": [0.0, 1.23456789, 0.5],
        "peak": 1,
    }


WINDOWS = [
    window("quantile", 0, 25),
    window("top", 1),
    window("top", 0),
    window("quantile", 0, 75),
    window("silent", 0),
    window("top", 0, split="heldout"),
    window("top", 2),
]


def test_feature_document_has_what_the_page_needs() -> None:
    document = feature_document(ROW, WINDOWS, per_group=2, transcoder="clt")
    Model.model_validate(json.loads(json.dumps(document)))
    assert document["index"] == cantor(1, 5) == 26
    assert document["top_logits"] == [" Texas", "“"] and document["bottom_logits"] == ["\n"]
    assert (document["act_min"], document["act_max"]) == (0.0, 3.0)
    assert document["activation_frequency"] == 0.0123457
    assert document["histogram"] == [4, 2, 1] and document["quantile_values"] == [0.5, 1.0]


def test_windows_are_grouped_ordered_and_capped() -> None:
    groups = feature_document(ROW, WINDOWS, per_group=2, transcoder="clt")["examples_quantiles"]
    assert [(group["quantile_name"], len(group["examples"])) for group in groups] == [
        ("Top activations", 2),
        ("From percentile 75", 1),
        ("From percentile 25", 1),
    ]
    first, second = groups[0]["examples"]
    assert first == {
        "tokens": ["in", " Dallas", " 0"],
        "tokens_acts_list": [0.0, 1.23457, 0.5],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }
    assert second["tokens"][2] == " 1"


def test_feature_that_never_fired() -> None:
    dead = {
        **ROW,
        "histogram": [],
        "histogram_edges": [],
        "quantile_values": [],
        "act_max": 0.0,
        "density": 0.0,
    }
    document = feature_document(dead, [], per_group=2, transcoder="clt")
    Model.model_validate(document)
    assert (document["act_max"], document["examples_quantiles"]) == (0.0, [])


def test_cantor_is_one_to_one() -> None:
    pairs = [(layer, feature) for layer in range(12) for feature in range(200)]
    assert len({cantor(*pair) for pair in pairs}) == len(pairs)


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "Ünï"})
    write_json(tmp_path / "b.json", {"a": "Ünï", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() == '{"a":"Ünï","b":1}\n'.encode()


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="finite numbers"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def graph(**metadata: object) -> dict:
    return {
        "metadata": {"slug": "a", "schema_version": 1, **metadata},
        "qParams": {},
        "nodes": [],
        "links": [],
    }


def test_index_lists_every_graph_and_forgets_older_ones(tmp_path: Path) -> None:
    write_index(tmp_path / "i.json", [graph(slug="old")])
    write_index(tmp_path / "i.json", [graph(slug="a"), graph(slug="b")])
    assert [entry["slug"] for entry in json.loads((tmp_path / "i.json").read_text())["graphs"]] == ["a", "b"]


def test_graph_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "g.json", graph(schema_version=2))
    with pytest.raises(StoreError, match="schema_version 1; found schema_version 2"):
        read_graph(tmp_path / "g.json")
    write_json(tmp_path / "g.json", {"metadata": {}, "nodes": []})
    with pytest.raises(StoreError, match="found without links, qParams"):
        read_graph(tmp_path / "g.json")
    (tmp_path / "g.json").write_text('{"metadata"')
    with pytest.raises(StoreError, match="a JSON file"):
        read_graph(tmp_path / "g.json")
    with pytest.raises(StoreError, match=r"none\.json"):
        read_graph(tmp_path / "none.json")


def test_feature_nodes_of_a_graph() -> None:
    shared = {"influence": 0.5, "activation": 2.0, "clerp": "x"}
    document = graph()
    document["nodes"] = [
        {"node_id": "2_17_4", "feature_type": "cross layer transcoder", **shared},
        {"node_id": "2_-1_4", "feature_type": "mlp reconstruction error", **shared},
        {"node_id": "E_17_4", "feature_type": "embedding", **shared},
    ]
    assert graph_features(document) == [{"layer": 2, "feature": 17, "pos": 4, **shared}]


def test_rounding_keeps_six_digits() -> None:
    assert [rounded(value) for value in (0.0, 1e-9 / 3, -123.456789)] == [0.0, 3.33333e-10, -123.457]
