"""Plain figures out of the accumulators: what the evaluation writes down."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.core.behaviour import Behaviour
from circuitmill.core.metrics import ExplainedVariance, Firing, cross_entropy_recovered

PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
BEHAVIOUR = ("agreement", "kl", "cross_entropy", "ce_recovered_zero", "ce_recovered_mean")
"""Figures of `behaviour_summary`."""


def number(value: float) -> float | None:
    """A figure for JSON, which has no word for what is not a number."""
    # + 0.0 turns -0.0 into 0.0
    return float(value) + 0.0 if math.isfinite(value) else None


def numbers(values: Float[Tensor, " layer"]) -> list[float | None]:
    """As `number`, for each layer."""
    return [number(value) for value in values.tolist()]


def fit_summary(explained: ExplainedVariance) -> dict:
    """Explained variance and NMSE = 1 - EV, pooled and per layer."""
    pooled, per_layer = explained.pooled(), explained.per_layer()
    return {
        "explained_variance": number(pooled),
        "nmse": number(1 - pooled),
        "per_layer": {"explained_variance": numbers(per_layer), "nmse": numbers(1 - per_layer)},
    }


def sparsity_summary(firing: Firing) -> dict:
    """L0 with percentiles over tokens, and features that never fired, in total and per layer.

    A layer is one that features read; a crosscoder, whose features read all of them, has one entry.
    """
    dead = firing.dead()
    return {
        "l0": float(firing.l0().sum()),
        "l0_percentiles": {name: firing.l0_total_percentile(share) for name, share in PERCENTILES.items()},
        "dead": int(dead.sum()),
        "dead_share": float(dead.double().mean()),
        "dead_window_tokens": firing.n_tokens,
        "per_layer": {
            "l0": firing.l0().tolist(),
            "l0_percentiles": {name: firing.l0_percentile(share).tolist() for name, share in PERCENTILES.items()},
            "dead": dead.sum(dim=1).tolist(),
        },
    }


def density_histogram(
    n_active: Int[Tensor, "layer feature"], n_tokens: int, per_decade: int
) -> tuple[list[float], list[list[int]]]:
    """Histogram of log10 density per layer, of the features that fired.

    >>> edges, counts = density_histogram(torch.tensor([[1, 10, 10, 0]]), n_tokens=100, per_decade=1)
    >>> edges, counts
    ([-2.0, -1.0, 0.0], [[1, 2]])

    Args:
        n_active: Tokens that each feature fired on.
        n_tokens: Of how many.
        per_decade: Bars per factor of ten.

    Returns:
        Edges, from at most 1 / n_tokens to 1, and counts by layer. A density on an edge counts to the right of it, 1 to
        the last bar.
    """
    n_decades = max(math.ceil(math.log10(n_tokens) - 1e-9), 1)
    n_bins = n_decades * per_decade
    place = (torch.log10(n_active.double() / n_tokens) + n_decades) * per_decade
    # the small number keeps densities like 10 / 100 from falling to the left of their edge by rounding
    cell = (place + 1e-9).floor().clamp(0, n_bins - 1).long()
    counts = [
        torch.bincount(row[fires], minlength=n_bins).tolist() for row, fires in zip(cell, n_active > 0, strict=True)
    ]
    return [round(index / per_decade - n_decades, 6) for index in range(n_bins + 1)], counts


def behaviour_summary(behaviours: dict[str, Behaviour], original: float) -> dict[str, dict[str, float | None]]:
    """Agreement, KL, cross-entropy and share of cross-entropy recovered of every changed model.

    Args:
        behaviours: Those of `zero_ablation` and `mean_ablation` among them.
        original: Cross-entropy of the model as it is, on the same tokens.
    """
    loss = {name: behaviour.cross_entropy() for name, behaviour in behaviours.items()}
    return {
        name: {
            "agreement": behaviour.agreement(),
            "kl": number(behaviour.kl()),
            "cross_entropy": number(loss[name]),
            **{
                f"ce_recovered_{kind}": _recovered(original, loss[name], loss[f"{kind}_ablation"])
                for kind in ("zero", "mean")
            },
        }
        for name, behaviour in behaviours.items()
    }


def _recovered(original: float, replaced: float, ablated: float) -> float | None:
    return number(cross_entropy_recovered(original, replaced, ablated)) if ablated != original else None


def tables(document: dict, firing: Firing) -> dict[str, dict[str, list]]:
    """The evaluation as tables of columns, by name: layers, features, l0 and, if there are any, tasks.

    What is undefined is None: behaviour of a transcoder that does not stand for MLPs, sparsity of a layer if features
    read several.
    """
    sparsity, one_layer = document["sparsity"]["per_layer"], document["one_layer"]
    n_sources, n_features = firing.n_active.shape
    n_layers = len(document["fit"]["per_layer"]["explained_variance"])
    unknown: list[None] = [None] * n_layers
    by_source = {
        "l0": sparsity["l0"],
        **{f"l0_{name}": values for name, values in sparsity["l0_percentiles"].items()},
        "dead": sparsity["dead"],
    }
    l0_tokens = firing.l0_total_histogram.tolist()
    found = {
        "layers": {
            "layer": list(range(n_layers)),
            **document["fit"]["per_layer"],
            **(by_source if n_sources == n_layers else dict.fromkeys(by_source, unknown)),
            **{key: [row["replacement"][key] for row in one_layer] if one_layer else unknown for key in BEHAVIOUR},
        },
        "features": {
            "layer": [source for source in range(n_sources) for _ in range(n_features)],
            "feature": list(range(n_features)) * n_sources,
            "n_active": firing.n_active.flatten().tolist(),
            "density": firing.density().flatten().tolist(),
        },
        "l0": {"n_features": list(range(len(l0_tokens))), "tokens": l0_tokens},
    }
    if document["tasks"]:
        found["tasks"] = {key: [row[key] for row in document["tasks"]] for key in document["tasks"][0]}
    return found
