"""What a graph's figures are, per prompt and over all prompts, as plain data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from circuitmill.graphs.graph import AttributionGraph, EdgeCheck
from circuitmill.graphs.prompts import last_position
from circuitmill.graphs.prune import Scores
from circuitmill.graphs.truth import Circuit, Concept, Named, check_concept
from circuitmill.stores.graphs import graph_features, rounded

SCORES = ("replacement_score", "completeness", "unattributed")


def expectation(kind: str, circuit: Circuit, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a circuit expects of its graph, in tokens and positions of its prompt.

    Raises:
        UpstreamError: a concept is expected after words that the prompt does not hold.
    """
    return {
        "kind": kind,
        "answers": list(circuit.answers),
        "first_tokens": [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in circuit.answers],
        "concepts": [
            {
                "name": concept.name,
                "words": list(concept.words),
                "after": concept.after,
                "pos": last_position(tokenizer, circuit.prompt, concept.after),
            }
            for concept in circuit.concepts
        ],
    }


def record(
    name: str,
    graph: AttributionGraph,
    document: Mapping[str, Any],
    scores: Scores,
    edge_check: EdgeCheck | None,
    expected: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The figures of one graph.

    Args:
        document: The pruned graph.
        edge_check: Result of comparing edges with interventions; None if none were.
        expected: What the prompt's circuit expects; None for a prompt without one.
    """
    targets = [{**dataclasses.asdict(target), "probability": rounded(target.probability)} for target in graph.targets]
    return {
        "prompt": name,
        "text": graph.prompt,
        "tokens": list(graph.token_texts),
        "replacement_score": rounded(scores.replacement),
        "completeness": rounded(scores.completeness),
        "unattributed": rounded(scores.unattributed),
        "n_active": graph.n_active,
        "n_traced": graph.n_features,
        "n_nodes": len(document["nodes"]),
        "n_links": len(document["links"]),
        "prediction": targets[0],
        "targets": targets,
        "edge_check": edge_check and _figures(edge_check),
        "kind": None if expected is None else expected["kind"],
        "expected": expected,
        "predicted": None if expected is None else targets[0]["token"] in expected["first_tokens"],
    }


def _figures(check: EdgeCheck) -> dict[str, Any]:
    return {
        "n_features": check.n_features,
        "worst_feature": rounded(check.worst_feature),
        "worst_logit": rounded(check.worst_logit),
        "largest_edge": rounded(check.largest_edge),
        "relative": rounded(check.relative),
    }


def with_concepts(
    figures: Mapping[str, Any], document: Mapping[str, Any], named: Mapping[tuple[int, int], Named]
) -> dict[str, Any]:
    """The figures of one graph, with the features that name its circuit's concepts.

    Args:
        figures: As `record` made them.
        named: What is said about every feature of the pruned graph.
    """
    nodes = graph_features(document)
    concepts = figures["expected"]["concepts"] if figures["expected"] else []
    found = [
        check_concept(Concept(concept["name"], tuple(concept["words"]), concept["after"]), concept["pos"], nodes, named)
        for concept in concepts
    ]
    return {**figures, "concepts": found}


def totals(graphs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over graphs, None if there are none, and counts of right answers and known concepts by kind of circuit."""
    kinds: dict[str, dict[str, int]] = {}
    for graph in graphs:
        if graph["kind"] is None:
            continue
        additions = {
            "graphs": 1,
            "predicted": int(graph["predicted"]),
            "concepts": len(graph["concepts"]),
            "concepts_found": sum(concept["found"] for concept in graph["concepts"]),
            "concepts_at_expected_pos": sum(concept["at_expected_pos"] for concept in graph["concepts"]),
        }
        counts = kinds.setdefault(graph["kind"], dict.fromkeys(additions, 0))
        for key, value in additions.items():
            counts[key] += value
    means = {
        f"mean_{key}": rounded(sum(graph[key] for graph in graphs) / len(graphs)) if graphs else None for key in SCORES
    }
    checked = [graph["edge_check"]["relative"] for graph in graphs if graph["edge_check"] is not None]
    return {**means, "worst_edge_error": max(checked, default=None), "circuits": kinds}
