"""The evaluation as tables and charts, for this variant and against the others."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from circuitmill.errors import StoreError
from circuitmill.stores.graphs import read_json
from circuitmill.viz.formatting import Real, count, percent

Figure = Real | None
"""A measured number; None where it is undefined (a variance of nothing, say)."""

MODELS = {
    "original": "Original model",
    "replacement": "All MLPs replaced",
    "mean_ablation": "MLPs at their mean",
    "zero_ablation": "MLPs off",
}
"""Key in evaluation.json -> name on the page, in the order of the table."""


@dataclass(frozen=True)
class Behaviour:
    """What one changed model predicts, against the original; None where it is the original itself."""

    cross_entropy: Figure
    agreement: Figure = None
    kl: Figure = None
    ce_recovered_zero: Figure = None
    ce_recovered_mean: Figure = None


@dataclass(frozen=True)
class LayerRow:
    """Fit and sparsity of one layer, and what replacing this layer alone changes.

    Sparsity is None if features read several layers, so that they are not one layer's.
    """

    place: str
    """Its number, or the name of what is read and reconstructed there."""
    ev: Figure
    l0: Figure
    l0_p5: Figure
    l0_p95: Figure
    dead: int | None
    kl: Figure


@dataclass(frozen=True)
class TaskRow:
    """Accuracy on one task of the embedded model."""

    name: str
    n: int
    original: Real
    replacement: Real
    mean_ablation: Real


@dataclass(frozen=True)
class Evaluation:
    """What the page shows of `evaluation.json`."""

    topology: str
    n_tokens: int
    n_features: int
    """Of each source."""
    n_sources: int
    """Groups of features that share what they read: layers, but one in a crosscoder."""
    ev: Figure
    """Pooled over layers."""
    l0: Real
    """Summed over sources."""
    dead: int
    """Over all sources."""
    layers: Sequence[LayerRow]
    unreplaceable: str | None
    """Why no MLPs are replaced, so that nothing is said about predictions."""
    models: Mapping[str, Behaviour]
    """By the keys of `MODELS`; empty if no MLPs are replaced, as are tasks."""
    tasks: Sequence[TaskRow]
    density_edges: Sequence[Real]
    """Of log10 density."""
    density_counts: Sequence[Sequence[int]]
    """Features per source and bin."""

    @property
    def n_layers(self) -> int:
        """Layers of the transcoder."""
        return len(self.layers)

    @property
    def all_features(self) -> int:
        """Features of all sources."""
        return self.n_features * self.n_sources

    @property
    def size(self) -> str:
        """How many features there are, and over what."""
        layers = f"{self.n_layers} layer" + "s" * (self.n_layers > 1)
        together = "" if self.n_sources == self.n_layers else " read together"
        return f"{self.topology}, {layers}{together} × {count(self.n_features)} features"

    @property
    def replacement(self) -> Behaviour:
        """The model with all MLPs replaced; without figures if they are not."""
        return self.models.get("replacement", Behaviour(None))


def read_evaluation(path: Path) -> Evaluation:
    """Read `evaluation.json`.

    Raises:
        StoreError: a figure is missing.
    """
    raw = read_json(path)
    try:
        return _evaluation(raw)
    except KeyError as error:
        raise StoreError(
            "the figures of stage evaluate", found=f"no {error}", where=path, fix="rerun stage evaluate"
        ) from error


def _evaluation(raw: Mapping[str, Any]) -> Evaluation:
    sparsity, density, shape = raw["sparsity"], raw["density_histogram"], raw["transcoder"]
    per_source = sparsity["per_layer"]
    places, n_sources = raw["places"], shape["n_sources"]
    by_source = [
        per_source["l0"],
        per_source["l0_percentiles"]["p5"],
        per_source["l0_percentiles"]["p95"],
        per_source["dead"],
    ]
    unknown = [None] * len(places)
    columns = (
        [str(layer) if place.startswith("mlp.") else place for layer, place in enumerate(places)],
        raw["fit"]["per_layer"]["explained_variance"],
        *(by_source if n_sources == len(places) else [unknown] * len(by_source)),
        [row["replacement"]["kl"] for row in raw["one_layer"]] if raw["one_layer"] else unknown,
    )
    return Evaluation(
        topology=shape["topology"],
        n_tokens=raw["tokens"]["evaluated"],
        n_features=shape["n_features"],
        n_sources=n_sources,
        ev=raw["fit"]["explained_variance"],
        l0=sparsity["l0"],
        dead=sparsity["dead"],
        layers=[LayerRow(*row) for row in zip(*columns, strict=True)],
        unreplaceable=raw["unreplaceable"],
        models={key: _known(Behaviour, raw["behaviour"][key]) for key in MODELS} if raw["behaviour"] else {},
        tasks=[_known(TaskRow, task) for task in raw["tasks"] or ()],
        density_edges=density["log10_edges"],
        density_counts=density["counts"],
    )


def _known(cls: type, row: Mapping[str, Any]) -> Any:
    """The fields that a dataclass has; those without a default must be there."""
    names = [one.name for one in fields(cls) if one.name in row or one.default is MISSING]
    return cls(**{name: row[name] for name in names})


def evaluation_tables(evaluation: Evaluation, descriptions: Mapping[str, str]) -> dict:
    """The context of the evaluation section.

    Args:
        descriptions: What a task asks, by name; may lack tasks.
    """

    def dead(n_dead: int, total: int) -> str:
        return f"{count(n_dead)} ({percent(n_dead / total, 1)})"

    return {
        "tokens": count(evaluation.n_tokens),
        "unreplaceable": evaluation.unreplaceable,
        "layers": [
            {**vars(row), "dead": "–" if row.dead is None else dead(row.dead, evaluation.n_features)}
            for row in evaluation.layers
        ],
        "total": {
            "ev": evaluation.ev,
            "l0": evaluation.l0,
            "dead": dead(evaluation.dead, evaluation.all_features),
        },
        "models": [
            {**vars(evaluation.models[key]), "name": name} for key, name in MODELS.items() if key in evaluation.models
        ],
        "tasks": [
            {**vars(task), "name": task.name.replace("_", " "), "description": descriptions.get(task.name, "")}
            for task in evaluation.tasks
        ],
    }


def density_charts(evaluation: Evaluation) -> list[dict]:
    """How often features fire, stacked over layers that they read."""
    by_layer = len(evaluation.density_counts) == evaluation.n_layers
    names = [row.place for row in evaluation.layers] if by_layer else ["all layers"]
    series = [
        {"name": f"layer {name}" if name.isdigit() else name, "counts": list(counts)}
        for name, counts in zip(names, evaluation.density_counts, strict=True)
    ]
    if not series:
        return []
    return [
        {
            "title": "Density of features on held-out tokens",
            "edges": list(evaluation.density_edges),
            "x_label": "log10 of the share of tokens it fires on",
            "log": False,
            "series": series,
        }
    ]


def variant_rows(this: str, evaluations: Mapping[str, Evaluation]) -> list[dict]:
    """One row per variant, from sparse to dense."""
    rows = [
        {
            "name": name,
            "here": name == this,
            "l0": one.l0,
            "ev": one.ev,
            "agreement": one.replacement.agreement,
            "kl": one.replacement.kl,
        }
        for name, one in evaluations.items()
    ]
    return sorted(rows, key=lambda row: (row["l0"], row["name"]))


def variant_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """L0 against what it buys, a point per variant that has the figure; nothing to draw for fewer than two."""
    charts = []
    for title, key in (("Explained variance", "ev"), ("Agreement", "agreement"), ("KL (nats)", "kl")):
        points = [
            {"name": row["name"], "here": row["here"], "x": row["l0"], "y": row[key]}
            for row in rows
            if row[key] is not None
        ]
        if len(points) > 1:
            charts.append({"title": f"{title} against L0", "x_label": "L0", "y_label": title, "points": points})
    return charts
