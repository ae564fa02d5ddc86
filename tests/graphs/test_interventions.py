"""An edge is what an intervention does, to 1e-4, on random models and random transcoders."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from circuitmill.graphs.graph import AttributionGraph, EdgeCheck
from circuitmill.graphs.interventions import verify_edges
from circuitmill.graphs.tracer import LocalReplacementModel

Trace = Callable[..., AttributionGraph]


@pytest.mark.parametrize("architecture", ["gpt_neo", "gpt2", "llama", "gemma2"])
def test_edges_are_interventions(
    build: Callable[[str], LocalReplacementModel],
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
    architecture: str,
) -> None:
    replaced = build(architecture)
    graph = trace_ids(replaced, prompt_ids)
    check = verify_edges(replaced, graph, list(range(0, graph.n_features, 5)))
    assert check.n_features > 10
    assert check.largest_edge > 0.1  # there is something to be wrong about
    assert check.worst_feature < 1e-4
    assert check.worst_logit < 1e-4


def test_edges_of_a_capped_graph_are_interventions(
    neo: LocalReplacementModel, prompt_ids: torch.Tensor, trace_ids: Trace
) -> None:
    check = verify_edges(neo, trace_ids(neo, prompt_ids, 15), list(range(15)))
    assert max(check.worst_feature, check.worst_logit) < 1e-4


def test_a_wrong_edge_is_found(neo: LocalReplacementModel, neo_graph: AttributionGraph) -> None:
    node = int(neo_graph.adjacency[:, : neo_graph.n_features].abs().sum(dim=0).argmax())
    target = int(neo_graph.adjacency[: neo_graph.n_features, node].abs().argmax())
    wrong = neo_graph.adjacency.clone()
    wrong[target, node] += 0.05
    check = verify_edges(neo, replace(neo_graph, adjacency=wrong), [node])
    assert check.worst_feature == pytest.approx(0.05, abs=1e-4)
    wrong = neo_graph.adjacency.clone()
    wrong[neo_graph.logits.start, node] += 0.05
    check = verify_edges(neo, replace(neo_graph, adjacency=wrong), [node])
    assert check.worst_logit == pytest.approx(0.05, abs=1e-4)


def test_relative_error_is_of_the_largest_edge_or_one() -> None:
    assert EdgeCheck(1, 0.2, 0.1, 4.0).relative == pytest.approx(0.05)
    assert EdgeCheck(1, 0.2, 0.3, 0.01).relative == pytest.approx(0.3)
