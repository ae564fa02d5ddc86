"""Edges against interventions: change a feature, freeze everything else, and compare with the graph's column.

With attention patterns, norm scales and MLP outputs frozen, setting an active feature to c times its
activation must change every feature's pre-activation and every logit by (c - 1) times the feature's edges.
The residual model is linear under those freezes, so the agreement is exact but for rounding.
"""

from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.graphs.graph import AttributionGraph, EdgeCheck
from circuitmill.graphs.tracer import LocalReplacementModel

FACTORS = (2.0, 0.0)
"""A checked feature is doubled, and removed."""


def verify_edges(replaced: LocalReplacementModel, graph: AttributionGraph, nodes: list[int]) -> EdgeCheck:
    """Intervene on features and compare with their columns.

    Args:
        nodes: Indices of feature nodes.
    """
    ids = torch.tensor(graph.tokens)
    worst_feature = worst_logit = largest = 0.0
    with replaced.zero_softcap():  # edges to a logit stop before a model's cap on it
        base, base_logits = _read(*replaced.get_activations(ids, apply_activation_function=False), graph)
        for node, factor in product(nodes, FACTORS):
            layer, pos, index = graph.features[node].tolist()
            column = graph.adjacency[:, node]
            value = graph.activations[node].item() * factor
            changed, logits = _read(*replaced.set_feature(ids, layer, pos, index, value), graph)
            gap = changed - base - (factor - 1) * column[: graph.n_features]
            worst_feature = max(worst_feature, gap.abs().max().item())
            gap = logits - base_logits - (factor - 1) * column[graph.logits]
            worst_logit = max(worst_logit, gap.abs().max().item())
            largest = max(largest, column.abs().max().item())
    return EdgeCheck(len(nodes), worst_feature, worst_logit, largest)


def _read(
    logits: Float[Tensor, "1 pos d_vocab"],
    activations: Float[Tensor, "layer pos feature"],
    graph: AttributionGraph,
) -> tuple[Tensor, Tensor]:
    """Pre-activations of the feature nodes, and the logit nodes' logits less the mean logit."""
    last = logits[0, -1]
    targets = [target.token for target in graph.targets]
    return activations[tuple(graph.features.T)].cpu(), (last[targets] - last.mean()).cpu()
