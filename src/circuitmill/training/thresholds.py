"""Thresholds for a nonlinearity that has none: those with which as much fires on held-out tokens as it keeps."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.config.train import OVER_TOKENS, TrainConfig
from circuitmill.core.conversion import ThresholdCalibration, feature_thresholds
from circuitmill.core.transcoder import Transcoder
from circuitmill.training.batches import Pair
from circuitmill.training.objective import Moment, evaluation
from circuitmill.training.parallel.layout import Layout, alone

WITH_THRESHOLDS = ("relu", "jumprelu")
"""Nonlinearities whose features have thresholds of their own while training."""


@torch.no_grad()
def kept_thresholds(
    transcoder: Transcoder, batches: Sequence[Pair], cfg: TrainConfig, moment: Moment, layout: Layout | None = None
) -> Float[Tensor, " source"] | Float[Tensor, "source feature"]:
    """One threshold per source if the nonlinearity ranks over a batch, else one per feature.

    Args:
        transcoder: In normalised units, with the weights that are to be finished.
        batches: Held-out inputs and outputs, of the size of a training batch.
        cfg: Of the training.
        moment: Of the training; a schedule of k is where it then is.
        layout: Of ranks that share features, all of which must come here with the same batches; None is one rank.

    Raises:
        DivergedError: nothing fires.
    """
    own, layout = cfg.nonlinearity, layout or alone(transcoder.n_features)
    tokens = sum(len(x) for x, _ in batches)
    groups = transcoder.n_sources if own.name == "batch_topk_all" else 1
    shared = ThresholdCalibration(
        transcoder.n_sources, math.ceil(max(own.k, own.k_start) * groups * tokens) + len(batches)
    )
    firings = torch.zeros_like(transcoder.log_threshold, dtype=torch.int64)
    for x, y in batches:
        batch = evaluation(transcoder, x, y, cfg, moment, layout.measuring)
        counts = torch.stack([a.firings() for a in batch.a])
        firings += counts
        if own.name in OVER_TOKENS:
            shared.update(batch.pre, layout.features.total(counts.sum(dim=1)).tolist())
    if own.name in OVER_TOKENS:
        return shared.thresholds(layout.features.gather)
    return feature_thresholds(transcoder, torch.cat([x for x, _ in batches]), firings)
