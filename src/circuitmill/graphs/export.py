"""A pruned graph as the JSON document that circuit-tracer's page draws.

The schema is circuit-tracer's. Two things differ from its own writer: error nodes are named
`{layer}_-1_{pos}` (its `0_{layer}_{pos}` is also the name of a feature of layer 0, and links to one would go
to the other), and features carry their explanation. Extra keys of `metadata` hold the scores.
"""

from collections.abc import Mapping
from typing import Any

from circuitmill.graphs.graph import AttributionGraph
from circuitmill.graphs.prune import Pruned, Scores
from circuitmill.stores.graphs import ERROR_NODE, FEATURE_NODE, SCAN, SCHEMA_VERSION, cantor, rounded


def graph_document(
    graph: AttributionGraph,
    pruned: Pruned,
    scores: Scores,
    *,
    slug: str,
    node_threshold: float,
    labels: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    """Nodes and links that pruning kept, in node order.

    Args:
        slug: Name of the graph.
        node_threshold: What pruning kept; also the largest value of the page's slider.
        labels: Explanation by layer and feature; features without one stay unlabelled.
    """
    describe = _describe(graph, labels)
    kept = pruned.nodes.nonzero().squeeze(1).tolist()
    nodes = {index: {**describe[index], "influence": rounded(pruned.influence[index].item())} for index in kept}
    weights = graph.adjacency
    links = [
        {
            "source": nodes[source]["node_id"],
            "target": nodes[target]["node_id"],
            "weight": rounded(weights[target, source].item()),
        }
        for target, source in pruned.edges.nonzero().tolist()
        if target in nodes and source in nodes
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": SCAN,
            "transcoder_list": [],
            "prompt": graph.prompt,
            "prompt_tokens": list(graph.token_texts),
            "node_threshold": node_threshold,
            "schema_version": SCHEMA_VERSION,
            "replacement_score": rounded(scores.replacement),
            "completeness": rounded(scores.completeness),
            "unattributed": rounded(scores.unattributed),
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": links,
    }


def _describe(graph: AttributionGraph, labels: Mapping[tuple[int, int], str]) -> list[dict[str, Any]]:
    """Every node of the unpruned graph, in node order."""
    rows = [
        _node(
            f"{layer}_{feature}_{pos}",
            FEATURE_NODE,
            layer=str(layer),
            pos=pos,
            feature=cantor(layer, feature),
            js_id=f"{layer}_{feature}-0",
            clerp=labels.get((layer, feature), ""),
            activation=rounded(activation),
        )
        for (layer, pos, feature), activation in zip(graph.features.tolist(), graph.activations.tolist(), strict=True)
    ]
    positions = range(len(graph.tokens))
    rows += [
        _node(f"{layer}_-1_{pos}", ERROR_NODE, layer=str(layer), pos=pos, feature=-1, js_id=f"{layer}_-1-{pos}")
        for layer in range(graph.n_layers)
        for pos in positions
    ]
    rows += [
        _node(f"E_{token}_{pos}", "embedding", layer="E", pos=pos, feature=pos, js_id=f"E_{token}-{pos}")
        for pos, token in enumerate(graph.tokens)
    ]
    last, layer = len(graph.tokens) - 1, str(graph.n_layers + 1)
    rows += [
        _node(
            f"{layer}_{target.token}_{last}",
            "logit",
            layer=layer,
            pos=last,
            feature=target.token,
            js_id=f"L_{target.token}-{last}",
            clerp=f'Output "{target.text}" (p={target.probability:.3f})',
            token_prob=rounded(target.probability),
            is_target_logit=rank == 0,
        )
        for rank, target in enumerate(graph.targets)
    ]
    return rows


def _node(
    node_id: str,
    kind: str,
    *,
    layer: str,
    pos: int,
    feature: int,
    js_id: str,
    clerp: str = "",
    activation: float | None = None,
    token_prob: float = 0.0,
    is_target_logit: bool = False,
) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": pos,
        "feature_type": kind,
        "token_prob": token_prob,
        "is_target_logit": is_target_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": clerp,
        "activation": activation,
    }
