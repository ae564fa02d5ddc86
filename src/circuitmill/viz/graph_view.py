"""Attribution graphs on the page: one data file per graph, the list, and a thumbnail drawn ahead."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from circuitmill.stores.graphs import graph_features

WIDTH, HEIGHT, PAD = 132, 66, 6
LINKS = 40
"""Links drawn in a thumbnail: the strongest."""

_CLASS = {
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "embedding",
    "logit": "logit",
}


def _places(document: Mapping[str, Any], n_layers: int) -> dict[str, tuple[float, float]]:
    """Centre of every node: columns are positions, rows are layers, nodes of a cell spread over the column."""
    cells: dict[tuple[int, int], list[str]] = {}
    for node in document["nodes"]:
        kind = _CLASS[node["feature_type"]]
        row = {"embedding": 0, "logit": n_layers + 1}.get(kind)
        row = int(node["layer"]) + 1 if row is None else row
        cells.setdefault((row, node["ctx_idx"]), []).append(node["node_id"])
    n_columns = len(document["metadata"]["prompt_tokens"])
    step = (WIDTH - 2 * PAD) / n_columns
    places = {}
    for (row, pos), names in cells.items():
        y = HEIGHT - PAD - row * (HEIGHT - 2 * PAD) / (n_layers + 1)
        for place, name in enumerate(names):
            places[name] = (PAD + step * (pos + (place + 0.5) / len(names)), y)
    return places


def thumbnail(document: Mapping[str, Any], n_layers: int) -> Markup:
    """A small picture of a graph as inline SVG; numbers only, so nothing in it needs escaping."""
    places = _places(document, n_layers)
    parts = []
    for link in sorted(document["links"], key=lambda link: -abs(link["weight"]))[:LINKS]:
        (x1, y1), (x2, y2) = places[link["source"]], places[link["target"]]
        parts.append(f'<path class="link" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
    for node in document["nodes"]:
        kind = _CLASS[node["feature_type"]]
        x, y = places[node["node_id"]]
        if kind == "feature":
            radius = 1.1 + 1.4 * (1 - min(1.0, node["influence"] or 0.0))
            parts.append(f'<circle class="feature" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
        elif kind != "error":
            parts.append(f'<rect class="{kind}" x="{x - 1.5:.1f}" y="{y - 1.5:.1f}" width="3" height="3"/>')
    return Markup(  # noqa: S704 - made of numbers and fixed names
        f'<svg class="thumb" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'
    )


def occurrences(documents: Mapping[str, Mapping[str, Any]]) -> dict[tuple[int, int], list[tuple[str, str, str]]]:
    """(layer, feature) -> (prompt name, node id, prompt) of every graph and position it occurs at."""
    found: dict[tuple[int, int], list[tuple[str, str, str]]] = {}
    for name, document in documents.items():
        prompt = document["metadata"]["prompt"]
        for node in graph_features(document):
            identity = f"{node['layer']}_{node['feature']}_{node['pos']}"
            found.setdefault((node["layer"], node["feature"]), []).append((name, identity, prompt))
    return found


def graph_entry(document: Mapping[str, Any], summary: Mapping[str, Any]) -> dict:
    """One row of the list of graphs.

    Args:
        document: The graph.
        summary: Its entry in attribute's summary.
    """
    expected, top = summary["expected"], summary["prediction"]
    return {
        "name": summary["prompt"],
        "circuit": (summary["kind"] or "prompts").replace("_", " "),
        "prompt": summary["text"],
        "prediction": top["text"],
        "probability": top["probability"],
        "expected": None if expected is None else " or ".join(answer.strip() for answer in expected["answers"]),
        "correct": summary["predicted"],
        "replacement_score": summary["replacement_score"],
        "completeness": summary["completeness"],
        "unattributed": summary["unattributed"],
        "edge_error": summary["edge_check"] and summary["edge_check"]["relative"],
        "n_nodes": len(document["nodes"]),
        "n_links": len(document["links"]),
        "concepts": [_concept(concept) for concept in summary["concepts"]],
    }


def _concept(concept: Mapping[str, Any]) -> dict:
    best = concept["best"]
    where = None if best is None else f"layer {best['layer']}, position {best['pos']}"
    node = None if best is None else f"{best['layer']}_{best['feature']}_{best['pos']}"
    return {"name": concept["name"], "found": concept["found"], "node": node, "where": where}


def by_circuit(entries: list[dict]) -> list[dict]:
    """The rows under the name of their circuit, in order of appearance."""
    groups: dict[str, list[dict]] = {}
    for entry in entries:
        groups.setdefault(entry["circuit"], []).append(entry)
    return [{"name": name, "graphs": graphs} for name, graphs in groups.items()]
