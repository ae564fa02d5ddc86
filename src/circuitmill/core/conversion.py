"""Thresholds for a transcoder that was trained with a top-k kind, so that each feature fires by itself.

What a top-k kind keeps depends on the other features, or on the other tokens of a batch. With a threshold per feature
the transcoder can be evaluated, exported and traced. All thresholds of a source are that source's running mean of the
least activation kept (Bussmann et al. 2024, "BatchTopK", section 3) times one factor, with which as many features fire
on held-out tokens as the top-k kind keeps there.

The factor is not searched for: if N places are to be above the threshold, it is the (N + 1)-th largest pre-activation
divided by the unscaled threshold, kept as a running list of the largest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import DivergedError


class ThresholdCalibration:
    """Streams over held-out batches.

    Args:
        n_sources: Groups of features.
        most: Upper bound of firings per token and source; more is not remembered.
    """

    def __init__(self, n_sources: int) -> None:
        self.n_tokens = 0
        self._wanted = [0] * n_sources
        self._largest: list[Tensor] = [torch.empty(0) for _ in range(n_sources)]

    @torch.no_grad()
    def update(self, pre: list[Float[Tensor, "token feature"]], kept: list[int]) -> None:
        """Take in one batch.

        Args:
            pre: Pre-activations, by source.
            kept: How many places the top-k kind keeps of each.
        """
        self.n_tokens += len(pre[0])
        for source, (values, count) in enumerate(zip(pre, kept, strict=True)):
            self._wanted[source] += count
            positive = values[values > 0]
            pool = torch.cat([self._largest[source].to(positive), positive])
            # one more than wanted so far, and room for batches in which more is kept than in this one
            room = min(len(pool), 2 * self._wanted[source] + 1)
            self._largest[source] = pool.topk(room).values

    def thresholds(self) -> Float[Tensor, " source"]:
        """One threshold per source, between the last place that is to fire and the next.

        Raises:
            DivergedError: a source has nothing that fires.
        """
        found = []
        for source, (values, wanted) in enumerate(zip(self._largest, self._wanted, strict=True)):
            if not 0 < wanted <= len(values):
                raise DivergedError(
                    "features that fire on held-out tokens",
                    found=f"{wanted} places kept, {len(values)} above zero",
                    where=f"source {source} of the transcoder",
                    fix="train longer, or with a larger train.nonlinearity.k",
                )
            # the threshold itself does not fire
            below = values[wanted] if wanted < len(values) else values[wanted - 1] / 2
            found.append(below)
        return torch.stack(found)

    def l0(self) -> Float[Tensor, " source"]:
        """Features that fire on a held-out token with the top-k kind, by source."""
        return torch.tensor(self._wanted) / self.n_tokens


@torch.no_grad()
def set_thresholds(transcoder: Transcoder, thresholds: Float[Tensor, " source"]) -> None:
    """Give every feature of a source the same threshold."""
    transcoder.log_threshold.copy_(thresholds.log()[:, None].expand_as(transcoder.log_threshold))
