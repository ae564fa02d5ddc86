"""Attribution graphs on disk, in the files that circuit-tracer's page reads.

    graph-metadata.json      {"graphs": [metadata of every graph]}
    graph_data/<slug>.json   metadata, qParams, nodes, links of one pruned graph
    features/<id>.json       windows, logits, histogram of a feature; id: Cantor number of (layer, feature)

All are UTF-8 JSON with sorted keys and numbers of six significant digits, so that equal graphs give equal
bytes. They are written whole or not at all. The page finds the features through `metadata.scan`, here always
`./data/features`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from circuitmill.errors import StoreError
from circuitmill.stores.files import atomic_write

SCAN = "./data/features"
"""Where circuit-tracer's page looks for feature files, seen from its index.html."""
SCHEMA_VERSION = 1
FEATURE_NODE = "cross layer transcoder"
ERROR_NODE = "mlp reconstruction error"
DIGITS = 6
"""Significant digits of numbers."""


def cantor(layer: int, feature: int) -> int:
    """One number for a layer and a feature, the name under which a feature's file is found.

    >>> cantor(0, 0), cantor(0, 1), cantor(1, 0), cantor(3, 1000)
    (0, 2, 1, 504506)
    """
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def rounded(value: float) -> float:
    """Six significant digits.

    >>> rounded(0.12345678), rounded(123456789.0)
    (0.123457, 123457000.0)
    """
    return float(f"{value:.{DIGITS}g}")


def write_json(path: Path, document: Any) -> None:
    """Write plain data; NaN and infinity are not JSON and raise.

    Raises:
        StoreError: a number is not finite.
    """
    try:
        text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise StoreError(
            "finite numbers", found=str(error), where=path, fix="report the prompt; this is a bug"
        ) from error
    atomic_write(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read plain data.

    Raises:
        StoreError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError("a JSON file", found=str(error), where=path, fix="rerun the stage that writes it") from error


def read_graph(path: Path) -> dict[str, Any]:
    """Read one graph.

    Raises:
        StoreError: missing, damaged, or of another schema version.
    """
    document = read_json(path)
    missing = {"metadata", "qParams", "nodes", "links"} - set(document)
    version = None if missing else document["metadata"].get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"a graph with metadata, qParams, nodes, links and schema_version {SCHEMA_VERSION}",
            found=f"without {', '.join(sorted(missing))}" if missing else f"schema_version {version}",
            where=path,
            fix="rerun stage attribute",
        )
    return document


def graph_features(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The feature nodes of a graph, with `layer`, `feature` (index in its layer) and `pos` as numbers."""
    found = []
    for node in document["nodes"]:
        if node["feature_type"] == FEATURE_NODE:
            layer, feature, pos = (int(part) for part in node["node_id"].split("_"))
            found.append(
                {
                    "layer": layer,
                    "feature": feature,
                    "pos": pos,
                    "influence": node["influence"],
                    "activation": node["activation"],
                    "clerp": node["clerp"],
                }
            )
    return found


def write_index(path: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write the list of graphs that the page offers, all at once: nothing to update or to race."""
    write_json(path, {"graphs": [document["metadata"] for document in documents]})


def feature_document(
    row: Mapping[str, Any], windows: Sequence[Mapping[str, Any]], per_group: int, transcoder: str
) -> dict[str, Any]:
    """What the page shows about a feature.

    Args:
        row: A row of the features table.
        windows: Rows of the windows table for this feature; those that explain it (split `train`) are shown.
        per_group: Most windows of a group (top activations; each quantile).
        transcoder: Name of the transcoder.
    """
    shown = sorted(
        (window for window in windows if window["split"] == "train" and window["kind"] in _GROUPS),
        key=lambda window: (_GROUPS[window["kind"]], -window["quantile"], window["rank"]),
    )
    groups = [
        {"quantile_name": name, "examples": [_example(window) for window in list(members)[:per_group]]}
        for name, members in groupby(shown, key=_group_name)
    ]
    edges = row["histogram_edges"]
    return {
        "transcoder_id": transcoder,
        "index": cantor(row["layer"], row["feature"]),
        "layer": row["layer"],
        "feature": row["feature"],
        "examples_quantiles": groups,
        "top_logits": [entry["text"] for entry in row["top_logits"]],
        "bottom_logits": [entry["text"] for entry in row["bottom_logits"]],
        "act_min": rounded(edges[0]) if edges else 0.0,
        "act_max": rounded(edges[-1] if edges else row["act_max"]),
        "quantile_values": [rounded(value) for value in row["quantile_values"] or [] if math.isfinite(value)],
        "histogram": list(row["histogram"]),
        "activation_frequency": rounded(row["density"]),
    }


_GROUPS = {"top": 0, "quantile": 1}
"""Kinds of windows that the page shows, in order."""


def _group_name(window: Mapping[str, Any]) -> str:
    return "Top activations" if window["kind"] == "top" else f"From percentile {window['quantile']}"


def _example(window: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokens": list(window["texts"]),
        "tokens_acts_list": [rounded(value) for value in window["activations"]],
        "train_token_ind": window["peak"],
        "is_repeated_datapoint": False,
    }
