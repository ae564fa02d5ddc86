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
    """Fit and sparsity of one layer, and what replacing this layer alone changes."""

    ev: Figure
    l0: Real
    l0_p5: Real
    l0_p95: Real
    dead: int
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

    n_tokens: int
    n_features: int
    """Per layer."""
    ev: Figure
    """Pooled over layers."""
    l0: Real
    """Summed over layers."""
    dead: int
    """Over all layers."""
    layers: Sequence[LayerRow]
    models: Mapping[str, Behaviour]
    """By the keys of `MODELS`."""
    tasks: Sequence[TaskRow]
    density_edges: Sequence[Real]
    """Of log10 density."""
    density_counts: Sequence[Sequence[int]]
    """Features per layer and bin."""

    @property
    def n_layers(self) -> int:
        """Layers of the transcoder."""
        return len(self.layers)

    @property
    def replacement(self) -> Behaviour:
        """The model with all MLPs replaced."""
        return self.models["replacement"]


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
    sparsity, density = raw["sparsity"], raw["density_histogram"]
    per_layer = sparsity["per_layer"]
    columns = (
        raw["fit"]["per_layer"]["explained_variance"],
        per_layer["l0"],
        per_layer["l0_percentiles"]["p5"],
        per_layer["l0_percentiles"]["p95"],
        per_layer["dead"],
        [row["replacement"]["kl"] for row in raw["one_layer"]],
    )
    tasks = raw["tasks"] or ()
    return Evaluation(
        n_tokens=raw["tokens"]["evaluated"],
        n_features=raw["transcoder"]["n_features"],
        ev=raw["fit"]["explained_variance"],
        l0=sparsity["l0"],
        dead=sparsity["dead"],
        layers=[LayerRow(*row) for row in zip(*columns, strict=True)],
        models={key: _known(Behaviour, raw["behaviour"][key]) for key in MODELS},
        tasks=[_known(TaskRow, task) for task in tasks],
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
    n_features = evaluation.n_features

    def dead(n_dead: int, total: int) -> str:
        return f"{count(n_dead)} ({percent(n_dead / total, 1)})"

    return {
        "tokens": count(evaluation.n_tokens),
        "layers": [
            {**vars(row), "layer": layer, "dead": dead(row.dead, n_features)}
            for layer, row in enumerate(evaluation.layers)
        ],
        "total": {
            "ev": evaluation.ev,
            "l0": evaluation.l0,
            "dead": dead(evaluation.dead, n_features * evaluation.n_layers),
        },
        "models": [{**vars(evaluation.models[key]), "name": name} for key, name in MODELS.items()],
        "tasks": [
            {**vars(task), "name": task.name.replace("_", " "), "description": descriptions.get(task.name, "")}
            for task in evaluation.tasks
        ],
    }


def density_charts(evaluation: Evaluation) -> list[dict]:
    """How often features fire, stacked over layers."""
    series = [
        {"name": f"layer {layer}", "counts": list(counts)} for layer, counts in enumerate(evaluation.density_counts)
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
    """L0 against what it buys, a point per variant; nothing to draw for one variant."""
    if len(rows) < 2:
        return []
    titles = (("Explained variance", "ev"), ("Agreement", "agreement"), ("KL (nats)", "kl"))
    return [
        {
            "title": f"{title} against L0",
            "x_label": "L0",
            "y_label": title,
            "points": [{"name": row["name"], "here": row["here"], "x": row["l0"], "y": row[key]} for row in rows],
        }
        for title, key in titles
    ]
