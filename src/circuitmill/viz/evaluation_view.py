"""The evaluation as tables and charts, for this variant and against the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.errors import StoreError
from circuitmill.stores.graphs import read_json
from circuitmill.viz.formatting import Real


@dataclass(frozen=True)
class TaskRow:
    """Accuracy on one task of the embedded model."""

    name: str
    original: Real
    replacement: Real
    ablated: Real | None
    n: int


@dataclass(frozen=True)
class Evaluation:
    """What the page shows of `evaluation.json`."""

    n_tokens: int
    n_features: int
    """Per layer."""
    ev: Real
    ev_per_layer: Sequence[Real]
    l0: Real
    """Summed over layers."""
    l0_per_layer: Sequence[Real]
    dead_per_layer: Sequence[int]
    agreement: Real
    kl: Real
    ce_original: Real
    ce_replacement: Real
    ce_recovered: Real
    tasks: Sequence[TaskRow]
    density_edges: Sequence[Real]
    """Of log10 density."""
    density_counts: Sequence[Sequence[int]]
    """Features per layer and bin."""

    @property
    def dead(self) -> int:
        """Features that never fired on the held-out tokens, over all layers."""
        return sum(self.dead_per_layer)

    @property
    def n_layers(self) -> int:
        """Layers of the transcoder."""
        return len(self.ev_per_layer)


def read_evaluation(path: Path) -> Evaluation:
    """Read `evaluation.json`.

    Raises:
        StoreError: a figure is missing.
    """
    raw = read_json(path)
    try:
        return _evaluation(raw)
    except (KeyError, TypeError) as error:
        raise StoreError(
            "the figures of stage evaluate", found=f"{error!r}", where=path, fix="rerun stage evaluate"
        ) from error


def _evaluation(raw: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**{**raw, "tasks": [TaskRow(**task) for task in raw["tasks"]]})


def evaluation_tables(evaluation: Evaluation, descriptions: Mapping[str, str]) -> dict:
    """The context of the evaluation section.

    Args:
        descriptions: What a task asks, by name; may lack tasks.
    """
    n_features = evaluation.n_features

    def dead(count: int, total: int) -> str:
        return f"{count:,} ({100 * count / total:.1f}%)"

    return {
        "tokens": f"{evaluation.n_tokens:,}",
        "layers": [
            {"layer": layer, "ev": ev, "l0": l0, "dead": dead(n_dead, n_features)}
            for layer, (ev, l0, n_dead) in enumerate(
                zip(evaluation.ev_per_layer, evaluation.l0_per_layer, evaluation.dead_per_layer, strict=True)
            )
        ],
        "total": {
            "label": "Pooled, total",
            "ev": evaluation.ev,
            "l0": evaluation.l0,
            "dead": dead(evaluation.dead, n_features * evaluation.n_layers),
        },
        "replacement": [
            ("Agreement with the model's first choice", f"{100 * evaluation.agreement:.1f}%"),
            ("KL from the model's prediction", f"{evaluation.kl:.4f} nats"),
            ("Cross-entropy of the model", f"{evaluation.ce_original:.4f} nats"),
            ("Cross-entropy with all MLPs replaced", f"{evaluation.ce_replacement:.4f} nats"),
            ("Cross-entropy recovered", f"{100 * evaluation.ce_recovered:.1f}%"),
        ],
        "tasks": [
            {**vars(task), "name": task.name.replace("_", " "), "description": descriptions.get(task.name, "")}
            for task in evaluation.tasks
        ],
        "has_ablated": any(task.ablated is not None for task in evaluation.tasks),
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
        {"name": name, "here": name == this, "l0": one.l0, "ev": one.ev, "agreement": one.agreement, "kl": one.kl}
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
