"""Influence, scores and pruning: by hand on seven nodes, and against circuit-tracer on a traced graph."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from circuit_tracer.graph import compute_graph_scores, prune_graph

from circuitmill.errors import DivergedError
from circuitmill.graphs.graph import AttributionGraph, Target
from circuitmill.graphs.prune import influence, logit_weights, normalized, prune, scores


def theirs(graph: AttributionGraph) -> SimpleNamespace:
    """As much of circuit-tracer's graph as its functions read."""
    return SimpleNamespace(
        input_tokens=graph.tokens,
        logit_targets=graph.targets,
        selected_features=range(graph.n_features),
        adjacency_matrix=graph.adjacency,
        logit_probabilities=torch.tensor([target.probability for target in graph.targets]),
        cfg=SimpleNamespace(n_layers=graph.n_layers),
    )


@pytest.fixture
def small() -> AttributionGraph:
    """One layer, two tokens, one logit; feature 0 reads token 1, feature 1 reads feature 0 and an error."""
    adjacency = torch.zeros(7, 7)
    adjacency[0, 5] = 2.0  # features 0, 1; errors 2, 3; embeddings 4, 5; logit 6
    adjacency[1, 0], adjacency[1, 3] = 3.0, -1.0
    adjacency[6, 1], adjacency[6, 4] = 0.8, 0.2
    return AttributionGraph(
        prompt="a",
        tokens=(1, 7),
        token_texts=("<b>", "a"),
        n_layers=1,
        n_active=2,
        features=torch.tensor([[0, 1, 5], [0, 1, 6]]),
        activations=torch.tensor([1.0, 2.0]),
        targets=(Target(9, "x", 0.5),),
        adjacency=adjacency,
        unattributed=torch.tensor([2.0, 0.0, 0, 0, 0, 0, 1.0]),
    )


def test_influence_by_hand(small: AttributionGraph) -> None:
    found = influence(normalized(small.adjacency), logit_weights(small))
    assert found.tolist() == pytest.approx([0.3, 0.4, 0, 0.1, 0.1, 0.3, 0])


def test_scores_by_hand(small: AttributionGraph) -> None:
    found = scores(small)
    assert found.replacement == pytest.approx(0.4 / 0.5)
    # importance: feature 0 .3, feature 1 .4 (a quarter from an error), error .1, embeddings .4, logit .5
    assert found.completeness == pytest.approx(1 - 0.4 * 0.25 / 1.7)
    # feature 0 gets 2 from nowhere beside 2, the logit 1 beside 1
    assert found.unattributed == pytest.approx((0.3 * 0.5 + 0.5 * 0.5) / 1.2)


def test_pruning_drops_what_lost_its_input(small: AttributionGraph) -> None:
    everything = prune(small, 1.0, 1.0)
    assert everything.nodes.tolist() == [True, True, False, True, True, True, True]
    assert everything.edges.sum() == 5
    # the three most influential nodes (feature 1, feature 0, token 1) hold 1.0 of 1.2; the error goes
    pruned = prune(small, 0.8, 1.0)
    assert pruned.nodes.tolist() == [True, True, False, False, True, True, True]
    # feature 1 alone is kept by the nodes' threshold, and has no input left
    alone = prune(small, 0.3, 1.0)
    assert alone.nodes.tolist() == [False, False, False, False, True, True, True]
    assert alone.edges.nonzero().tolist() == [[6, 4]]


def test_cumulative_influence_of_the_most_important_is_smallest(small: AttributionGraph) -> None:
    found = prune(small, 1.0, 1.0).influence
    assert found.argmin() == 1
    assert found[1].item() == pytest.approx(0.4 / 1.2)
    assert found.max().item() == pytest.approx(1.0)


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 0.999), (1.0, 1.0)])
def test_same_as_circuit_tracer(neo_graph: AttributionGraph, thresholds: tuple[float, float]) -> None:
    found, wanted = prune(neo_graph, *thresholds), prune_graph(theirs(neo_graph), *thresholds)
    assert torch.equal(found.nodes, wanted.node_mask)
    kept = wanted.node_mask[:, None] & wanted.node_mask
    assert torch.equal(found.edges & kept, wanted.edge_mask & kept)
    torch.testing.assert_close(found.influence, wanted.cumulative_scores, atol=1e-6, rtol=0)
    ours = scores(neo_graph)
    assert (ours.replacement, ours.completeness) == pytest.approx(compute_graph_scores(theirs(neo_graph)), abs=1e-6)
    assert 0 < ours.unattributed < 1


def test_cycle_is_refused(small: AttributionGraph) -> None:
    adjacency = small.adjacency.clone()
    adjacency[0, 1] = 1.0
    with pytest.raises(DivergedError, match="acyclic graph"):
        scores(replace(small, adjacency=adjacency))
