import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from circuit_tracer.frontend.graph_models import Model, Node

from circuitmill.graphs.export import graph_document
from circuitmill.graphs.graph import AttributionGraph
from circuitmill.graphs.prune import Pruned, Scores, prune, scores


def export(graph: AttributionGraph, pruned: Pruned, **labels: str) -> dict:
    named = {tuple(int(part) for part in name[1:].split("_")): text for name, text in labels.items()}
    return graph_document(
        graph, pruned, Scores(0.123456789, 0.5, 0.25), slug="two_hop-00", node_threshold=0.8, labels=named
    )


@pytest.fixture
def document(neo_graph: AttributionGraph) -> dict:
    return export(neo_graph, prune(neo_graph, 0.8, 0.98))


def everything(graph: AttributionGraph) -> Pruned:
    size = len(graph.adjacency)
    return Pruned(torch.ones(size, dtype=bool), graph.adjacency != 0, torch.linspace(0, 1, size))


def test_metadata(document: dict, neo_graph: AttributionGraph) -> None:
    assert document["metadata"] == {
        "slug": "two_hop-00",
        "scan": "./data/features",
        "transcoder_list": [],
        "prompt": "text",
        "prompt_tokens": list(neo_graph.token_texts),
        "node_threshold": 0.8,
        "schema_version": 1,
        "replacement_score": 0.123457,
        "completeness": 0.5,
        "unattributed": 0.25,
    }


def test_links_join_nodes_of_the_document_and_carry_the_edges(document: dict, neo_graph: AttributionGraph) -> None:
    pruned = prune(neo_graph, 0.8, 0.98)
    assert len(document["nodes"]) == pruned.nodes.sum() < len(neo_graph.adjacency)
    assert len(document["links"]) == pruned.edges.sum() > 100
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids)
    kept = pruned.nodes.nonzero().squeeze(1).tolist()
    place = dict(zip(ids, kept, strict=True))
    for link in document["links"]:
        edge = neo_graph.adjacency[place[link["target"]], place[link["source"]]].item()
        assert link["weight"] == pytest.approx(edge, rel=1e-5)


def test_same_nodes_as_the_library_except_error_ids(neo_graph: AttributionGraph) -> None:
    found = export(neo_graph, everything(neo_graph))["nodes"]
    layer, pos, feature = neo_graph.features[3].tolist()
    wanted = Node.feature_node(layer, pos, feature, activation=neo_graph.activations[3].item()).model_dump()
    assert {**found[3], "influence": None} == {
        **wanted,
        "activation": pytest.approx(wanted["activation"], rel=1e-5),
    }
    error = neo_graph.errors.start + len(neo_graph.tokens) + 2
    wanted = Node.error_node(1, 2).model_dump()
    assert found[error] == {**found[error], "feature": wanted["feature"], "layer": "1", "ctx_idx": 2}
    assert found[error]["node_id"] == "1_-1_2" != wanted["node_id"]
    assert found[error]["feature_type"] == wanted["feature_type"]
    embedding = found[neo_graph.embeddings.start + 1]
    wanted = Node.token_node(1, neo_graph.tokens[1]).model_dump()
    assert {**embedding, "influence": None} == wanted
    target = neo_graph.targets[0]
    wanted = Node.logit_node(
        pos=len(neo_graph.tokens) - 1,
        vocab_idx=target.token,
        token=target.text,
        num_layers=3,
        target_logit=True,
        token_prob=target.probability,
    ).model_dump()
    logit = found[neo_graph.logits.start]
    assert {**logit, "influence": None} == {
        **wanted,
        "token_prob": pytest.approx(wanted["token_prob"], rel=1e-5),
    }


def test_error_and_feature_of_layer_zero_have_different_ids(neo_graph: AttributionGraph) -> None:
    """Feature 1 of layer 0 and the error of layer 1 at one position: one name in the library's own files."""
    features = neo_graph.features.clone()
    features[0] = torch.tensor([0, 2, 1])
    assert Node.feature_node(0, 2, 1).node_id == Node.error_node(1, 2).node_id
    graph = replace(neo_graph, features=features)
    ids = Counter(node["node_id"] for node in export(graph, everything(graph))["nodes"])
    assert ids["0_1_2"] == 1 and ids["1_-1_2"] == 1


def test_explanations_are_the_labels_of_features_at_every_position(neo_graph: AttributionGraph) -> None:
    layer, _, feature = neo_graph.features[0].tolist()
    document = export(neo_graph, everything(neo_graph), **{f"f{layer}_{feature}": "fires on “Texas”"})
    mine = [node for node in document["nodes"] if node["node_id"].startswith(f"{layer}_{feature}_")]
    others = [node for node in document["nodes"] if node["feature_type"].startswith("cross") and node not in mine]
    assert mine and {node["clerp"] for node in mine} == {"fires on “Texas”"}
    assert others and {node["clerp"] for node in others} == {""}


def test_document_is_valid_json_and_fits_the_librarys_model(document: dict) -> None:
    text = json.dumps(document, allow_nan=False)
    model = Model.model_validate(json.loads(text))
    assert len(model.nodes) == len(document["nodes"])
    for node in document["nodes"]:
        assert set(node) == set(Node.model_fields)


def test_equal_graphs_give_equal_documents(neo_graph: AttributionGraph, document: dict) -> None:
    assert scores(neo_graph) == scores(neo_graph)
    assert json.dumps(export(neo_graph, prune(neo_graph, 0.8, 0.98))) == json.dumps(document)
