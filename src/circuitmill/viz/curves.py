"""Training curves from metrics.jsonl and throughput.jsonl: what shares a chart, and how many points are drawn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.errors import StoreError
from circuitmill.stores.metrics import THROUGHPUT, whole_rows
from circuitmill.viz.formatting import Real

POINTS = 400
"""Most points per curve: a chart is about as many pixels wide."""

Row = Mapping[str, Any]

TERMS = {
    "tanh_sparsity": "tanh sparsity",
    "l1": "L1",
    "quadratic_l0": "quadratic L0",
    "pre_activation": "pre-activation",
    "cross_entropy": "cross-entropy",
    "kl": "KL",
}
"""Terms of the loss that are not called by their names with spaces."""


@dataclass(frozen=True)
class Chart:
    """One figure of curves over tokens, and the measurements it shows."""

    title: str
    keys: Mapping[str, str]
    """Key in a row of metrics -> name in the legend; `a/b` is b in group a. A list gives a curve per entry."""
    terms: str = ""
    """Besides, a curve per term of the loss that has a coefficient: what its name is put after in a row."""
    log: bool = False
    zero: bool = False
    """Whether the vertical axis starts at zero."""
    settled: bool = False
    """Whether the vertical axis leaves out the first tenth of the training."""
    mean: bool = False
    """Whether lists are averaged."""
    unit: float = 1.0
    """Of the vertical axis, in units of the measurement."""


@dataclass(frozen=True)
class Bars:
    """One histogram: the last row that has it."""

    title: str
    key: str
    x_label: str


GROUPS: Mapping[str, Sequence[Chart | Bars]] = {
    "Fit": (
        Chart("Loss and its terms before weighting", {"loss": "loss"}, terms="loss_", log=True),
        Chart("Explained variance", {"ev": "training batches", "heldout_ev": "held-out tokens"}, settled=True),
        Chart("Explained variance per layer", {"ev_per_layer": "layer"}, settled=True),
        Chart(
            "Replacement model on held-out tokens",
            {
                "replacement_agreement": "agreement",
                "replacement_ce_recovered": "cross-entropy recovered",
            },
            settled=True,
        ),
        Chart("Replacement KL (nats), held-out tokens", {"replacement_kl": "KL"}, log=True),
    ),
    "Features": (
        Chart("L0 per layer", {"l0": "layer"}, zero=True, settled=True),
        Chart(
            "L0 on held-out tokens, averaged over layers",
            {
                "heldout_l0": "mean",
                "heldout_l0_percentiles/p5": "5% of tokens",
                "heldout_l0_percentiles/p50": "median",
                "heldout_l0_percentiles/p95": "95%",
            },
            zero=True,
            settled=True,
            mean=True,
        ),
        Chart("Share of dead features", {"dead": "dead"}, zero=True),
        Chart("Entropy of the use of transforms (nats)", {"heldout_usage_entropy": "layer"}, zero=True),
        Bars("Density at the end", "density_histogram", "log10 of the running share of tokens it fires on"),
        Bars("Thresholds at the end", "threshold_histogram", "log10 of the threshold"),
        Bars("Decoder norms at the end", "decoder_norm_histogram", "log10 of what the feature writes"),
        Bars(
            "Relative decoder norms at the end", "relative_norm_histogram", "0: first model only, 1: other model only"
        ),
        Bars("Cosine of two models' decoders at the end", "cosine_histogram", "cosine"),
    ),
    "Optimisation": (
        Chart("Learning rate", {"lr": "learning rate"}, zero=True),
        Chart("Coefficients of the loss", {}, terms="coefficients/", log=True),
        Chart("Scale of the loss in float16", {"loss_scale": "scale"}, log=True),
        Chart("Gradient norm before clipping", {"grad_norm": "norm"}, log=True),
    ),
}
"""The charts of the training section, by heading."""

SPEED: Mapping[str, Sequence[Chart | Bars]] = {
    "Speed": (
        Chart("Tokens per second", {"tokens_per_second": "tokens per second"}, zero=True),
        Chart("Share of time spent waiting for data", {"data_wait_share": "share"}, zero=True),
        Chart("Peak memory (GB)", {"peak_memory_bytes": "memory"}, zero=True, unit=1e9),
    ),
}
"""Those that another training of the same would not draw alike."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished training, with speed and memory where throughput.jsonl is there.

    Raises:
        StoreError: a line is not a JSON object with `tokens`, or there is none.
    """
    rows, measured = [], {row["step"]: row for _, row in whole_rows(path.with_name(THROUGHPUT))}
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["tokens"] += 0
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _unreadable(f"{line[:80]!r} ({type(error).__name__})", f"{path}:{place}") from error
        rows.append(row | measured.get(row.get("step"), {}))
    if not rows:
        raise _unreadable("no rows", path)
    return rows


def _unreadable(found: str, where: object) -> StoreError:
    return StoreError("one JSON object with `tokens` per line", found=found, where=where, fix="rerun stage train")


def thin(rows: Sequence[Any], most: int = POINTS) -> list[Any]:
    """Evenly spaced rows, first and last included.

    >>> thin(range(10), most=4)
    [0, 3, 6, 9]
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def training_charts(rows: Sequence[Row], groups: Mapping[str, Sequence[Chart | Bars]] = GROUPS) -> list[dict]:
    """Headings with the specifications that `static/charts.js` draws. What has no measurement is left out."""
    found = []
    for title, charts in groups.items():
        drawn = [_bars(rows, chart) if isinstance(chart, Bars) else _curves(rows, chart) for chart in charts]
        if any(drawn):
            found.append({"title": title, "charts": [spec for spec in drawn if spec is not None]})
    return found


def _curves(rows: Sequence[Row], chart: Chart) -> dict | None:
    """Curves over the tokens at which any of them was measured; None where one was not."""
    points: dict[str, dict[int, Real]] = {}
    for place, name in _places(rows, chart).items():
        # each is thinned by itself: what is measured rarely would hardly ever be among what is measured often
        for row in thin([row for row in rows if _at(row, place) is not None]):
            for key, value in _parts(_at(row, place), name, chart):
                points.setdefault(key, {})[row["tokens"]] = value / chart.unit
    # a logarithmic axis has no place for what is zero throughout, as the term of a loss that never comes into play
    points = {name: values for name, values in points.items() if not chart.log or any(values.values())}
    if not points:
        return None
    x = sorted({tokens for values in points.values() for tokens in values})
    return {
        "kind": "lines",
        "title": chart.title,
        "x": x,
        "x_label": "tokens",
        "log": chart.log,
        "zero": chart.zero,
        "settled": chart.settled,
        # of which measurement the only curve is, where there could be others
        "legend": len(chart.keys) > 1,
        "series": [{"name": name, "values": [values.get(tokens) for tokens in x]} for name, values in points.items()],
    }


def _places(rows: Sequence[Row], chart: Chart) -> dict[str, str]:
    """Where in a row each measurement of a chart is, and its name."""
    places = dict(chart.keys)
    for row in rows if chart.terms else ():
        places |= {chart.terms + term: _term(term) for term in row.get("coefficients", {})}
    return places


def _term(name: str) -> str:
    return TERMS.get(name, name if ":" in name else name.replace("_", " "))


def _at(row: Row, place: str) -> Any:
    value: Any = row
    for key in place.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _parts(value: Any, name: str, chart: Chart) -> list[tuple[str, Real]]:
    """The numbers of one measurement with their curves' names, without those that are undefined."""
    if not isinstance(value, Sequence):
        return [(name, value)]
    known = [(index, part) for index, part in enumerate(value) if part is not None]
    if chart.mean:
        return [(name, sum(part for _, part in known) / len(known))] if known else []
    return [(f"{name} {index}", part) for index, part in known]


def _bars(rows: Sequence[Row], bars: Bars) -> dict | None:
    value = next((row[bars.key] for row in reversed(rows) if row.get(bars.key) is not None), None)
    if value is None:
        return None
    counts = value["counts"]
    names = value.get("names") or [f"layer {index}" for index in range(len(counts))]
    return {
        "kind": "histogram",
        "title": bars.title,
        "edges": value["log10_edges"] if "log10_edges" in value else value["edges"],
        "x_label": bars.x_label,
        "log": False,
        "series": [{"name": name, "counts": row} for name, row in zip(names, counts, strict=True)],
    }
