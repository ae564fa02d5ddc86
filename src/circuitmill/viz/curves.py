"""Training curves from `metrics.jsonl`: which measurements share a chart, and how many points are drawn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.errors import StoreError
from circuitmill.viz.formatting import Real

POINTS = 400
"""Most points per curve: a chart is about as many pixels wide."""


@dataclass(frozen=True)
class Chart:
    """One figure and the measurements it shows."""

    title: str
    keys: Mapping[str, str]
    """Key in a row of metrics -> name in the legend. A key that holds a list gives a curve per layer."""
    log: bool = False
    zero: bool = False
    """Whether the vertical axis starts at zero."""
    settled: bool = False
    """Whether the vertical axis leaves out the first tenth of the training."""


CHARTS = (
    Chart(
        "Loss and its terms before weighting",
        {
            "loss": "loss",
            "loss_reconstruction": "reconstruction",
            "loss_sparsity": "sparsity",
            "loss_pre_activation": "pre-activation",
            "loss_auxiliary": "auxiliary",
        },
        log=True,
    ),
    Chart("Explained variance per layer", {"ev_per_layer": "layer"}, settled=True),
    Chart("L0 per layer", {"l0": "layer"}, zero=True, settled=True),
    Chart("Share of dead features", {"dead": "dead"}, zero=True),
    Chart("Learning rate", {"lr": "learning rate"}, zero=True),
    Chart("Sparsity coefficient", {"sparsity": "coefficient"}, zero=True),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished training.

    Raises:
        StoreError: a line is not a JSON object with `tokens`, or there is none.
    """
    rows = []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["tokens"] += 0
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _unreadable(f"{line[:80]!r} ({type(error).__name__})", f"{path}:{place}") from error
        rows.append(row)
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


def _flat(value: Any, name: str) -> dict[str, Real]:
    if isinstance(value, Sequence):
        return {f"{name} {index}": part for index, part in enumerate(value)}
    return {name: value}


def training_charts(rows: Sequence[Mapping[str, Any]], charts: Sequence[Chart] = CHARTS) -> list[dict]:
    """The specifications that `static/charts.js` draws. Charts without any measurement are left out."""
    drawn = []
    for chart in charts:
        kept = thin([row for row in rows if any(row.get(key) is not None for key in chart.keys)])
        points: list[dict[str, Real]] = []
        for row in kept:
            point: dict[str, Real] = {}
            for key, name in chart.keys.items():
                if row.get(key) is not None:
                    point |= _flat(row[key], name)
            points.append(point)
        names = list(dict.fromkeys(name for point in points for name in point))
        series = [{"name": name, "values": [point.get(name) for point in points]} for name in names]
        # A term that is switched off is zero throughout and would only crowd the legend.
        series = [one for one in series if not chart.log or any(value for value in one["values"])]
        if series:
            drawn.append(
                {
                    "title": chart.title,
                    "x": [row["tokens"] for row in kept],
                    "x_label": "tokens",
                    "log": chart.log,
                    "zero": chart.zero,
                    "settled": chart.settled,
                    "series": series,
                }
            )
    return drawn
