"""Figures of the evaluation as SVG text.

The same data gives the same bytes: ids are salted with a constant and no date is written. Text stays text, so that
figures are searchable and take the reader's font.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
"""Okabe and Ito's palette, told apart also with colour-blind eyes."""
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "circuitmill",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler("color", COLOURS),
    "legend.frameon": False,
    "savefig.transparent": True,
}


_styled = matplotlib.rc_context(_STYLE)
"""Decorator: draw and write in this module's style, and leave the global one as it was."""


class _Drawing:
    """One figure with one pair of axes."""

    def __init__(self, title: str, x_label: str, y_label: str, width: float = 5.2, height: float = 3.2) -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set(title=title, xlabel=x_label, ylabel=y_label)

    def svg(self) -> str:
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "circuitmill"})
        return buffer.getvalue()


@_styled
def plot_explained_variance(per_layer: Sequence[float | None], pooled: float | None) -> str:
    """Explained variance of each layer, with the pooled value as a line. None stands for an undefined value."""
    drawing = _Drawing("Explained variance on held-out tokens", "layer", "explained variance")
    known = [(layer, value) for layer, value in enumerate(per_layer) if value is not None]
    drawing.axes.plot([layer for layer, _ in known], [value for _, value in known], marker="o", label="layer")
    if pooled is not None:
        drawing.axes.axhline(pooled, color=COLOURS[1], linestyle="--", label=f"pooled, {pooled:.4f}")
    drawing.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.axes.legend()
    return drawing.svg()


@_styled
def plot_l0(mean: Sequence[float], low: Sequence[int], high: Sequence[int]) -> str:
    """Features firing per token in each layer: mean, and the 5th to the 95th percentile of tokens."""
    drawing = _Drawing("L0 on held-out tokens (bars: mean; lines: 5% to 95% of tokens)", "layer", "features firing")
    layers = range(len(mean))
    drawing.axes.bar(layers, mean, color=COLOURS[0])
    drawing.axes.vlines(layers, low, high, color=COLOURS[7], linewidth=1)
    drawing.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawing.svg()


@_styled
def plot_l0_histogram(tokens: Sequence[int]) -> str:
    """How many tokens have how many features firing, over all layers; entry i counts tokens with i features."""
    drawing = _Drawing("Features firing on a token, all layers", "features", "tokens")
    last = max((count for count, n in enumerate(tokens) if n), default=0)
    drawing.axes.bar(range(last + 1), tokens[: last + 1], width=1.0, color=COLOURS[0])
    return drawing.svg()


@_styled
def plot_density(edges: Sequence[float], counts: Sequence[Sequence[int]]) -> str:
    """Histogram of log10 density, a line per layer; features that never fired are not in it."""
    drawing = _Drawing("How often features fire", "log10 of the share of tokens", "features")
    for layer, row in enumerate(counts):
        drawing.axes.stairs(row, edges, label=f"layer {layer}", color=COLOURS[layer % len(COLOURS)])
    if len(counts) <= len(COLOURS):
        drawing.axes.legend()
    return drawing.svg()


@_styled
def plot_one_layer(kl: Sequence[float], kl_mean_ablation: Sequence[float]) -> str:
    """What replacing one layer alone costs, against ablating it to its mean."""
    drawing = _Drawing("One layer at a time", "layer", "KL from the model (nats per token)")
    layers = range(len(kl))
    drawing.axes.plot(layers, kl, marker="o", label="replaced by the transcoder")
    drawing.axes.plot(layers, kl_mean_ablation, marker="s", label="replaced by its mean output")
    drawing.axes.set_yscale("log")
    drawing.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.axes.legend()
    return drawing.svg()


@_styled
def plot_tasks(names: Sequence[str], accuracies: Mapping[str, Sequence[float]]) -> str:
    """Accuracy on each task, a bar per model.

    Args:
        names: Of the tasks.
        accuracies: Name of the model -> accuracy on each task.
    """
    drawing = _Drawing("Accuracy on the tasks", "accuracy", "", width=5.2, height=0.8 + 0.42 * len(names))
    height = 0.8 / len(accuracies)
    for place, (model, values) in enumerate(accuracies.items()):
        at = [index + (place - (len(accuracies) - 1) / 2) * height for index in range(len(names))]
        drawing.axes.barh(at, values, height=height, label=model, color=COLOURS[place % len(COLOURS)])
    drawing.axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    drawing.axes.invert_yaxis()
    drawing.axes.set_xlim(0, 1)
    drawing.axes.grid(False, axis="y")
    drawing.figure.legend(loc="outside lower center", ncols=len(accuracies))
    return drawing.svg()


def plot_evaluation(document: dict, l0_tokens: Sequence[int]) -> dict[str, str]:
    """All figures of an evaluation, by name.

    Args:
        document: The content of evaluation.json.
        l0_tokens: Tokens on which as many features fire as the entry's number.
    """
    fit, sparsity, density = document["fit"], document["sparsity"]["per_layer"], document["density_histogram"]
    percentiles = sparsity["l0_percentiles"]
    found = {
        "explained_variance": plot_explained_variance(
            fit["per_layer"]["explained_variance"], fit["explained_variance"]
        ),
        "l0": plot_l0(sparsity["l0"], percentiles["p5"], percentiles["p95"]),
        "l0_histogram": plot_l0_histogram(l0_tokens),
        "density": plot_density(density["log10_edges"], density["counts"]),
    }
    # undefined for a transcoder that does not stand for MLPs
    if document["one_layer"]:
        kl = {name: [row[name]["kl"] for row in document["one_layer"]] for name in ("replacement", "mean_ablation")}
        found["one_layer"] = plot_one_layer(kl["replacement"], kl["mean_ablation"])
    if document["tasks"]:
        models = ("original", "replacement", "mean_ablation")
        accuracies = {model.replace("_", " "): [row[model] for row in document["tasks"]] for model in models}
        found["tasks"] = plot_tasks([row["name"] for row in document["tasks"]], accuracies)
    return found
