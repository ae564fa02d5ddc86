"""Feature pages: compact records in chunks that a page loads on demand, and the index that search runs over.

A chunk holds the features of one layer whose numbers share `feature // chunk_features`. Texts of tokens are
stored once per chunk; windows refer to them by number and name only the activations that are not zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from circuitmill.viz.formatting import Real
from circuitmill.viz.site import PathOf, write_data

Key = tuple[int, int]
"""Layer and feature."""


def significant(value: Real, digits: int = 4) -> float:
    """Round to significant digits: four are more than a shade of colour can show.

    >>> significant(0.123456), significant(12345.6)
    (0.1235, 12350.0)
    """
    return float(f"{value:.{digits}g}")


@dataclass
class Texts:
    """Token texts by number, each once."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        """The number of a text, new ones in order of appearance."""
        return self.numbers.setdefault(text, len(self.numbers))


def window_record(window: Mapping[str, Any], texts: Texts) -> dict:
    """One window: kind, quantile, token numbers, [place, activation] pairs, peak."""
    record = {
        "k": window["kind"],
        "t": [texts.number(text) for text in window["texts"]],
        "a": [[place, significant(value)] for place, value in enumerate(window["activations"]) if value > 0],
        "p": window["peak"],
    }
    return record | ({"q": window["quantile"]} if window["kind"] == "quantile" else {})


def chosen_windows(windows: Iterable[Mapping[str, Any]], top: int, quantile: int) -> list[Mapping[str, Any]]:
    """The windows a page shows: the `top` strongest, then at most `quantile` per quantile from high to low.

    Windows of the split that explanations were written from; the others are for scoring.
    """
    shown = [window for window in windows if window["split"] == "train"]
    best = sorted((window for window in shown if window["kind"] == "top"), key=lambda window: window["rank"])[:top]
    samples = [window for window in shown if window["kind"] == "quantile"]
    samples.sort(key=lambda window: (-window["quantile"], -window["rank"]))
    taken: dict[int, int] = {}
    for window in samples:
        taken[window["quantile"]] = taken.get(window["quantile"], 0) + 1
        if taken[window["quantile"]] <= quantile:
            best.append(window)
    return best


@dataclass(frozen=True)
class Sources:
    """What one page is made of."""

    row: Mapping[str, Any]
    """Of the features table."""
    explanation: Mapping[str, Any]
    """Of the explanations table."""
    windows: Sequence[Mapping[str, Any]]
    """Those to show, in order."""


def feature_record(sources: Sources, graphs: Sequence[tuple[str, str, str]], texts: Texts) -> dict:
    """Everything one feature page shows.

    Args:
        graphs: (prompt name, node id, prompt) of the graphs it occurs in.
        texts: Of the chunk; grows.
    """
    row, explanation = sources.row, sources.explanation
    scores = {name: explanation[name] for name in ("detection", "precision", "recall")}
    return {
        "explanation": explanation["explanation"],
        "explainer": explanation["explainer"],
        **{name: None if value is None else significant(value) for name, value in scores.items()},
        "n_scored": explanation["n_scored"],
        "density": significant(row["density"]),
        "n_active": row["n_active"],
        "act_max": significant(row["act_max"]),
        "act_mean": significant(row["act_mean"]),
        "histogram": list(row["histogram"]),
        "edges": [significant(edge) for edge in row["histogram_edges"]],
        "top": [[entry["text"], significant(entry["value"])] for entry in row["top_logits"]],
        "bottom": [[entry["text"], significant(entry["value"])] for entry in row["bottom_logits"]],
        "windows": [window_record(window, texts) for window in sources.windows],
        "graphs": [list(graph) for graph in graphs],
    }


def choose_pages(n_active: Mapping[Key, int], in_graphs: Iterable[Key], most: int) -> set[Key]:
    """Which features get a page: all that occur in a graph, then the most active ones, `most` in all.

    >>> sorted(choose_pages({(0, 0): 5, (0, 1): 9, (1, 0): 0}, [(1, 0)], most=2))
    [(0, 1), (1, 0)]
    """
    pages = set(in_graphs)
    for key in sorted(n_active, key=lambda key: (-n_active[key], key)):
        if len(pages) >= most:
            break
        pages.add(key)
    return pages


class IndexColumns:
    """The index of feature pages, one list per column: about 60 bytes a feature."""

    NAMES = ("layer", "feature", "explanation", "detection", "density", "act_max", "graphs")

    def __init__(self) -> None:
        self.columns: dict[str, list] = {name: [] for name in self.NAMES}

    def add(self, layer: int, feature: int, record: Mapping[str, Any]) -> None:
        """Append one feature."""
        n_graphs = len({name for name, _, _ in record["graphs"]})
        entry = {**record, "layer": layer, "feature": feature, "graphs": n_graphs}
        for name, column in self.columns.items():
            column.append(entry[name])


def chunks(records: Iterable[Sources], chunk_features: int) -> Iterator[list[Sources]]:
    """Features of one layer, in order, cut where `feature // chunk_features` changes."""
    for _, members in groupby(records, key=lambda record: record.row["feature"] // chunk_features):
        yield list(members)


def write_chunk(
    path_of: PathOf,
    layer: int,
    records: Sequence[Sources],
    chunk_features: int,
    graphs: Mapping[Key, Sequence[tuple[str, str, str]]],
    index: IndexColumns,
) -> None:
    """Write one data file of feature pages and enter them in the index."""
    texts, features = Texts(), {}
    for record in records:
        feature = record.row["feature"]
        features[feature] = feature_record(record, graphs.get((layer, feature), ()), texts)
        index.add(layer, feature, features[feature])
    number = records[0].row["feature"] // chunk_features
    write_data(path_of, f"features/{layer}-{number}", {"texts": list(texts.numbers), "features": features})
