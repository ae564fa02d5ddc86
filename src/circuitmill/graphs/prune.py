"""What matters in a graph: influence, pruning and scores.

With A[target, source] = |edge| normalised over each row, the influence of all nodes on the logits is
v = w (A + A^2 + ...), w the logit nodes' probabilities; the graph is acyclic, so the series ends. Scores and
pruning are circuit-tracer's, computed here on our own graph (a test compares them): "Circuit Tracing",
Ameisen et al. 2025, sections "Evaluating the graph" and "Pruning".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitmill.errors import DivergedError
from circuitmill.graphs.graph import AttributionGraph


@dataclass(frozen=True)
class Pruned:
    """Which nodes and edges of a graph to show."""

    nodes: Bool[Tensor, " node"]
    edges: Bool[Tensor, "node node"]
    influence: Float[Tensor, " node"]
    """Cumulative share when nodes are sorted from most to least influential: small means important."""


@dataclass(frozen=True)
class Scores:
    """How much of the model's computation the graph holds; all between 0 and 1."""

    replacement: float
    """Share of the logits' influence that starts at embeddings rather than at errors."""
    completeness: float
    """Share of the nodes' inputs, weighted by influence, that does not come from errors."""
    unattributed: float
    """Share of the nodes' inputs, weighted by influence, that comes from no node."""


def normalized(adjacency: Float[Tensor, "node node"]) -> Float[Tensor, "node node"]:
    """Absolute edges, each target's inputs summing to 1; rows without inputs stay zero."""
    size = adjacency.abs()
    return size / size.sum(dim=1, keepdim=True).clamp(min=1e-10)


def logit_weights(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The probability of each logit node, zero elsewhere."""
    weights = torch.zeros(len(graph.adjacency))
    weights[graph.logits] = torch.tensor([target.probability for target in graph.targets])
    return weights


def influence(shares: Float[Tensor, "node node"], weights: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """Sum up w (A + A^2 + ...) for normalised edges A.

    Raises:
        DivergedError: the edges form a cycle, so that the series does not end.
    """
    step = weights @ shares
    total = step.clone()
    for _ in range(len(weights)):
        if not step.any():
            return total
        step = step @ shares
        total += step
    raise DivergedError(
        "an acyclic graph, whose influence ends at the embeddings",
        found=f"influence left after {len(weights)} steps",
        where="the adjacency matrix",
        fix="trace the prompt again; a node depends on itself",
    )


def scores(graph: AttributionGraph) -> Scores:
    """Replacement score, completeness and the unattributed share of the unpruned graph."""
    shares, weights = normalized(graph.adjacency), logit_weights(graph)
    reach = influence(shares, weights)
    embedded, failed = reach[graph.embeddings].sum(), reach[graph.errors].sum()
    importance = reach + weights
    explained = 1 - shares[:, graph.errors].sum(dim=1)
    missing = graph.unattributed.abs()
    inputs = torch.zeros_like(importance)
    inputs[: graph.n_features] = importance[: graph.n_features]
    inputs[graph.logits] = importance[graph.logits]
    lost = missing / (missing + graph.adjacency.abs().sum(dim=1)).clamp(min=1e-10)
    return Scores(
        replacement=(embedded / (embedded + failed)).item(),
        completeness=((explained * importance).sum() / importance.sum()).item(),
        unattributed=((lost * inputs).sum() / inputs.sum()).item(),
    )


def prune(graph: AttributionGraph, node_threshold: float, edge_threshold: float) -> Pruned:
    """Keep the fewest nodes, then the fewest edges, that hold the given shares of influence.

    Embeddings and logits are always kept. Features and errors that are left without an output, and features
    left without an input, go, until none is.

    Args:
        node_threshold: Share of the nodes' influence, between 0 and 1.
        edge_threshold: Share of the remaining edges' influence, between 0 and 1.
    """
    weights = logit_weights(graph)
    reach = influence(normalized(graph.adjacency), weights)
    nodes = reach >= _smallest_kept(reach, node_threshold)
    nodes[graph.embeddings] = True
    nodes[graph.logits] = True
    shares = normalized(graph.adjacency * nodes[:, None] * nodes)
    flow = shares * (influence(shares, weights) + weights)[:, None]
    edges = flow >= _smallest_kept(flow.flatten(), edge_threshold)
    inner = graph.embeddings.start
    while True:
        before = nodes.clone()
        nodes[:inner] &= edges[:, :inner].any(dim=0)
        nodes[: graph.n_features] &= edges[: graph.n_features].any(dim=1)
        edges = edges & nodes[:, None] & nodes
        if torch.equal(nodes, before):
            break
    order = reach.argsort(descending=True, stable=True)
    cumulative = torch.zeros_like(reach)
    cumulative[order] = reach[order].cumsum(0) / reach.sum()
    return Pruned(nodes, edges, cumulative)


def _smallest_kept(values: Tensor, share: float) -> Tensor:
    """The smallest of the largest values that together hold the share of the sum."""
    ordered = values.sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(held, share)), len(ordered) - 1)]
