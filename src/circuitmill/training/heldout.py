"""What is measured now and then while training: fit on held-out tokens, features, the replacement model.

| key | what |
|---|---|
| heldout_ev, heldout_ev_per_layer | explained variance, with the nonlinearity of the training |
| heldout_l0, heldout_l0_percentiles | features that fire on a token, by source: mean; p5, p50 and p95 over tokens |
| heldout_usage_entropy | molt: of which transforms fire, in nats, by source; low if few do all the work |
| dead, dead_features | share of features without a firing in `dead_tokens` tokens; their number by source |
| density_histogram | running share of tokens on which a feature fires, over the last `dead_tokens` |
| threshold_histogram | jumprelu: thresholds, in units of the pre-activation |
| decoder_norm_histogram | length of what a feature writes, concatenated over targets |
| relative_norm_histogram | crosscoder over models: share of a further model in a feature's decoder norms |
| cosine_histogram | crosscoder over models: of two models' decoders, for shared and for exclusive features |
| replacement_... | what is measured of the replacement model, by the measurement's own names |

A histogram is {log10_edges or edges, counts}: a row of counts per source and one edge more than bars. With `names` the
rows are something else, which these name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.conversion import set_thresholds
from circuitmill.core.metrics import ExplainedVariance, percentile_of_counts
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.summaries import PERCENTILES, density_histogram, number, numbers
from circuitmill.core.transcoder import Transcoder
from circuitmill.stores.metrics import Row
from circuitmill.training.batches import Pair
from circuitmill.training.objective import Moment, evaluation
from circuitmill.training.parallel.cut import join
from circuitmill.training.parallel.layout import Layout, alone
from circuitmill.training.state import TrainState
from circuitmill.training.thresholds import WITH_THRESHOLDS, kept_thresholds

Replaced = Callable[[Transcoder], Mapping[str, float | None]]
"""Measures the language model with its MLPs replaced by a finished transcoder."""
Histogram = dict[str, Any]

PER_DECADE = 5
"""Bars per factor of ten."""
MOST_BARS = 60
"""Of a histogram whose range is not known beforehand."""
EVEN_BARS = 20
"""Of a histogram with a known range."""
SHARED = (0.3, 0.7)
"""Relative decoder norms between which a feature counts as shared ("Circuits Updates, February 2025")."""


class HeldOut:
    """The same held-out tokens, measured again and again.

    Ranks that share features measure together; of ranks that have all features one measures alone (`Layout.measures`).
    The random state and the parameters are left as they are.

    Args:
        batches: Normalised inputs and outputs, on the training device; none leaves out all but the replacement model.
            Nonlinearities that rank over a batch see these batches, so they should be as large as a training batch.
        cfg: Of the training.
        scaling: Normalised units to raw ones, for the replacement model.
        replaced: Measures the replacement model, on the first rank; None leaves it out.
        layout: Of the training; None is one rank.
    """

    def __init__(
        self,
        batches: Sequence[Pair],
        cfg: TrainConfig,
        *,
        scaling: Scaling,
        replaced: Replaced | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._batches, self._cfg, self._scaling, self._replaced = batches, cfg, scaling, replaced
        self._layout = layout or alone(cfg.n_features)

    @torch.no_grad()
    def measure(self, state: TrainState) -> Row:
        """The part of a row of metrics that does not come from the batch at hand; what is undefined is None."""
        row: Row = {}
        if self._batches:
            row |= self._fit(state) | feature_figures(state, self._cfg, self._layout)
        if self._replaced is not None:
            whole = finished(state, self._cfg, self._scaling, self._batches, self._layout)
            if whole is not None:
                row |= {f"replacement_{name}": value for name, value in self._replaced(whole).items()}
        return row

    def _fit(self, state: TrainState) -> Row:
        cfg, transcoder = self._cfg, state.transcoder
        moment = moment_of(state, cfg)
        explained = ExplainedVariance(transcoder.n_layers, transcoder.d_model, device=transcoder.b_dec.device)
        active, firings = [], torch.zeros_like(state.idle)
        for x, y in self._batches:
            batch = evaluation(transcoder, x, y, cfg, moment, self._layout.measuring)
            explained.update(y, batch.y_hats[-1])
            # one source at a time is dense, as its pre-activations are
            here = torch.stack([(a.dense() > 0).sum(dim=1) for a in batch.a])
            active.append(self._layout.features.total(here))
            firings += torch.stack([a.firings() for a in batch.a])
        counts = torch.cat(active, dim=1)
        histogram = torch.stack([torch.bincount(row, minlength=cfg.n_features + 1) for row in counts])
        row: Row = {
            "heldout_ev": number(explained.pooled()),
            "heldout_ev_per_layer": numbers(explained.per_layer()),
            "heldout_l0": counts.double().mean(dim=1).tolist(),
            "heldout_l0_percentiles": {
                name: percentile_of_counts(histogram, PERCENTILES[name]).tolist() for name in ("p5", "p50", "p95")
            },
        }
        if transcoder.architecture.topology == "molt":
            row["heldout_usage_entropy"] = numbers(usage_entropy(firings))
        return row


def moment_of(state: TrainState, cfg: TrainConfig) -> Moment:
    """Where a training is between two steps."""
    return Moment(state.step * cfg.batch_tokens, state.dead(cfg.dead_tokens), state.density, state.n_dead)


@torch.no_grad()
def finished(
    state: TrainState,
    cfg: TrainConfig,
    scaling: Scaling,
    batches: Sequence[Pair] = (),
    layout: Layout | None = None,
) -> Transcoder | None:
    """The transcoder as it would be if the training ended now: whole, in raw units, with a threshold per feature.

    Args:
        state: Of the training.
        cfg: Of the training.
        scaling: Normalised units to raw ones.
        batches: Held-out tokens on which a nonlinearity without thresholds gets some, as at the end (fewer than then);
            without any it gets the running mean of the least activation kept.
        layout: Of the training; ranks that share features must all come here. None is one rank.

    Returns:
        A copy on the training device; the training goes on with its own. None on ranks other than the first, if
        features are shared.
    """
    layout = layout or alone(state.transcoder.n_features)
    device = state.idle.device
    thresholds = None
    if cfg.nonlinearity.name not in WITH_THRESHOLDS:
        found = (
            kept_thresholds(state.transcoder, batches, cfg, moment_of(state, cfg), layout) if batches else state.least
        )
        thresholds = layout.features.join(found, 1, layout.shard.total) if found.ndim == 2 else found
    whole: Transcoder | None = state.transcoder
    if layout.features.size > 1:
        whole = join(state.transcoder, layout, cfg.architecture)
    if whole is None:
        return None
    transcoder = fold(whole.to(device), scaling.to(device))
    # folding leaves pre-activations as they are
    if thresholds is not None:
        set_thresholds(transcoder, thresholds)
    return transcoder


@torch.no_grad()
def feature_figures(state: TrainState, cfg: TrainConfig, layout: Layout | None = None) -> Row:
    """What counters and parameters say about features, without any tokens.

    Args:
        state: Of the training.
        cfg: Of the training.
        layout: Of the training; ranks that share features must all come here. None is one rank.
    """
    transcoder, layout = state.transcoder, layout or alone(state.transcoder.n_features)

    def whole(values: Tensor) -> Tensor:
        return layout.features.join(values, 1, layout.shard.total)

    dead = whole(state.dead(cfg.dead_tokens).to(torch.uint8)).bool()
    firings = (whole(state.density).double() * cfg.dead_tokens).round().long()
    edges, counts = density_histogram(firings.cpu(), cfg.dead_tokens, PER_DECADE)
    row: Row = {
        "dead": dead.double().mean().item(),
        "dead_features": dead.sum(dim=1).tolist(),
        "density_histogram": {"log10_edges": edges, "counts": counts},
        "decoder_norm_histogram": log10_histogram(whole(transcoder.decoder_norms())),
    }
    if cfg.nonlinearity.name == "jumprelu":
        row["threshold_histogram"] = log10_histogram(whole(transcoder.threshold))
    if transcoder.architecture.models > 1:
        row |= between_models(*(whole(values.T[None])[0].T for values in relations(transcoder)))
    return row


def log10_histogram(values: Float[Tensor, "source feature"]) -> Histogram | None:
    """Histogram of the logarithm of positive numbers, a row per source; None if there are no positive ones.

    A number on an edge counts to the right of it. Those too small for `MOST_BARS` bars count to the first.

    >>> log10_histogram(torch.tensor([[1.0, 1.1, 0.0, 2.0]]))
    {'log10_edges': [0.0, 0.2, 0.4], 'counts': [[2, 1]]}
    """
    logs = values.detach().double().log10().cpu()
    counted = logs.isfinite()
    if not counted.any():
        return None
    # the small number keeps powers of ten from falling to the left of their edge by rounding, that of float32 included
    cells = (logs * PER_DECADE + 1e-5).floor()
    last = int(cells[counted].max())
    first = max(int(cells[counted].min()), last - MOST_BARS + 1)
    bars = [(row[kept].clamp_min(first) - first).long() for row, kept in zip(cells, counted, strict=True)]
    return {
        "log10_edges": [round(cell / PER_DECADE, 6) for cell in range(first, last + 2)],
        "counts": [torch.bincount(row, minlength=last - first + 1).tolist() for row in bars],
    }


def even_histogram(rows: Sequence[Float[Tensor, " _"]], low: float, high: float) -> Histogram:
    """Histogram with equal bars from `low` to `high`, a row per tensor; what is not a number is in none.

    >>> even_histogram([torch.tensor([0.0, 0.01, 1.0, torch.nan])], 0.0, 1.0)["counts"][0][::19]
    [2, 1]
    """
    counts = []
    for row in rows:
        cells = ((row[row.isfinite()].double() - low) / (high - low) * EVEN_BARS).floor().clamp(0, EVEN_BARS - 1)
        counts.append(torch.bincount(cells.long(), minlength=EVEN_BARS).tolist())
    return {
        "edges": [round(low + (high - low) * bar / EVEN_BARS, 6) for bar in range(EVEN_BARS + 1)],
        "counts": counts,
    }


def relations(transcoder: Transcoder) -> tuple[Float[Tensor, "feature _"], Float[Tensor, "feature _"]]:
    """Relative decoder norms and cosines of a crosscoder's features, of each further model against the first.

    r = ||d^B|| / (||d^A|| + ||d^B||), d being a feature's decoder vectors for one model, concatenated over its layers.
    Not a number where a feature has no decoder for the models compared.
    """
    models = transcoder.architecture.models
    vectors = transcoder.decoder_block(0).detach().unflatten(1, (models, -1)).flatten(2)
    norms = torch.linalg.vector_norm(vectors, dim=2)
    relative = norms[:, 1:] / (norms[:, :1] + norms[:, 1:])
    # einsum(vectors[:, 1:], vectors[:, 0], "feature row column, feature column -> feature row")
    products = (vectors[:, 1:] @ vectors[:, 0, :, None]).squeeze(2)
    return relative, products / (norms[:, :1] * norms[:, 1:])


def between_models(relative: Float[Tensor, "feature _"], cosine: Float[Tensor, "feature _"]) -> Row:
    """Histograms of what `relations` gives.

    Shared features have .3 < r < .7, all others are exclusive ("Circuits Updates, February 2025"). A feature without
    any decoder is in neither histogram, one without a decoder for one of the models has no cosine.
    """
    shared = (relative > SHARED[0]) & (relative < SHARED[1])
    by_model = even_histogram(list(relative.T), 0.0, 1.0)
    return {
        "relative_norm_histogram": by_model | {"names": [f"model {model + 1}" for model in range(relative.shape[1])]},
        "cosine_histogram": even_histogram([cosine[shared], cosine[~shared]], -1.0, 1.0)
        | {"names": ["shared", "exclusive"]},
    }


def usage_entropy(firings: Int[Tensor, "source feature"]) -> Float[Tensor, " source"]:
    """Entropy in nats of the distribution of a source's firings over its features; not a number without firings.

    The logarithm of the number of features if all fire equally often, zero if one does all the work.

    >>> usage_entropy(torch.tensor([[5, 5, 0], [7, 0, 0]]))
    tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    return torch.special.entr(firings.double() / firings.sum(dim=1, keepdim=True)).sum(dim=1)
