"""Thresholds for a transcoder that was trained with a top-k kind, so that each feature fires by itself.

What a top-k kind keeps depends on the other features, or on the other tokens of a batch. With a threshold per feature
the transcoder can be evaluated, exported and traced. Either way as many places are above the thresholds on held-out
tokens as the top-k kind keeps there:

- `ThresholdCalibration`: all features of a source get one threshold (Bussmann et al. 2024, "BatchTopK", section 3).
  That is what a kind that ranks over a batch does anyhow.
- `feature_thresholds`: each feature fires as often as it is kept. A kind that ranks the features of one token keeps
  small values on some tokens and drops large ones on others; one threshold for all would leave whole tokens without
  features (explained variance .79 against .95 on the demo's layers with TopK 8, .98 with TopK itself).

The one threshold is not searched for: if N places are to fire, it is the middle between the N-th largest
pre-activation and the next. Which values that will be is known at the end only, because a later batch may keep more
than it has large values for. So nothing is forgotten that may still be one of the N + 1 largest: every positive value,
unless an upper bound of N is given.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import DivergedError, ShapeError

UNREACHED = 1e-5
"""How far above a pre-activation a threshold lies that it must not exceed, relative to it; more than rounding moves."""


class ThresholdCalibration:
    """Streams over held-out batches.

    Args:
        n_sources: Groups of features.
        most: Upper bound of the places that are kept of one source, over all batches. With it twice as many values are
            in memory between two batches, without it all positive ones.
    """

    def __init__(self, n_sources: int, most: int | None = None) -> None:
        self.n_tokens, self._most = 0, most
        self._wanted = [0] * n_sources
        self._positive: list[list[Tensor]] = [[] for _ in range(n_sources)]

    @torch.no_grad()
    def update(self, pre: list[Float[Tensor, "token feature"]], kept: list[int]) -> None:
        """Take in one batch.

        Args:
            pre: Pre-activations, by source; of the features that are here.
            kept: How many places the top-k kind keeps of each, over all processes.

        Raises:
            ShapeError: another number of sources, or more is kept than the upper bound says.
        """
        if not len(pre) == len(kept) == len(self._wanted):
            raise ShapeError(
                f"{len(self._wanted)} sources",
                found=f"pre-activations of {len(pre)}, kept places of {len(kept)}",
                where="ThresholdCalibration.update",
                fix="pass one entry per source",
            )
        self.n_tokens += len(pre[0])
        for source, (values, count) in enumerate(zip(pre, kept, strict=True)):
            self._wanted[source] += count
            self._positive[source].append(values[values > 0])
            if self._most is not None:
                self._forget(source, self._most)

    def _forget(self, source: int, most: int) -> None:
        """All but the `most` + 1 largest, once that halves what is remembered."""
        if self._wanted[source] > most:
            raise ShapeError(
                f"at most {most} places kept of a source",
                found=str(self._wanted[source]),
                where=f"source {source} of the transcoder",
                fix="raise the upper bound",
            )
        remembered = self._positive[source]
        if sum(map(len, remembered)) > 2 * (most + 1):
            self._positive[source] = [torch.cat(remembered).topk(most + 1).values]

    def thresholds(self, gather: Callable[[Tensor], Tensor] = lambda values: values[None]) -> Float[Tensor, " source"]:
        """One threshold per source, between the last place that is to fire and the next.

        Args:
            gather: From the largest values here to those of all processes that share features, a row for each.

        Raises:
            DivergedError: a source has nothing that fires.
        """
        found = []
        for source, (parts, wanted) in enumerate(zip(self._positive, self._wanted, strict=True)):
            padding = torch.zeros(wanted + 1, device=parts[0].device if parts else None)
            values = torch.cat([*parts, padding])
            values = gather(values.topk(wanted + 1).values).flatten().topk(wanted + 1).values
            n_positive = int((values > 0).sum())
            if not 0 < wanted <= n_positive:
                raise DivergedError(
                    "features that fire on held-out tokens",
                    found=f"{wanted} places kept" + (f", {n_positive} above zero" if wanted else ""),
                    where=f"source {source} of the transcoder",
                    fix="train longer, or with a larger train.nonlinearity.k",
                )
            # the middle, so that rounding the logarithm of the threshold moves neither across it
            found.append(values[-2:].double().mean())
        return torch.stack(found)

    def l0(self) -> Float[Tensor, " source"]:
        """Features that fire on a held-out token with the top-k kind, by source."""
        return torch.tensor(self._wanted) / self.n_tokens


@torch.no_grad()
def feature_thresholds(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    firings: Int[Tensor, "source feature"],
    *,
    block: int = 1024,
) -> Float[Tensor, "source feature"]:
    """Thresholds with which each feature fires on as many of these tokens as it was kept on.

    They lie in the middle between the last pre-activation that is to fire and the next, or, for a feature that was
    never kept, a little above its largest.

    Args:
        x: Normalised inputs of all tokens.
        firings: On how many of them each feature was kept.
        block: Features at a time.
    """
    found = torch.empty_like(transcoder.log_threshold)
    for source in range(transcoder.n_sources):
        for low in range(0, transcoder.n_features, block):
            span = slice(low, low + block)
            pre = transcoder.pre_activations_source(source, x, span)
            count = firings[source, span]
            ordered = pre.sort(dim=0, descending=True).values
            last = ordered.gather(0, (count - 1).clamp_min(0)[None])[0]
            following = ordered.gather(0, count.clamp_max(len(x) - 1)[None])[0]
            above = last.double().clamp_min(0) * (1 + UNREACHED)
            middle = torch.where(count > 0, (last.double() + following.double()) / 2, above)
            # what fires is positive, so a threshold of zero or less is one in the middle to the next positive number
            found[source, span] = torch.where(middle > 0, middle, last.clamp_min(0) / 2).to(found.dtype)
    return found.clamp_min(torch.finfo(found.dtype).tiny)


@torch.no_grad()
def set_thresholds(
    transcoder: Transcoder, thresholds: Float[Tensor, " source"] | Float[Tensor, "source feature"]
) -> None:
    """Give features their thresholds, or every feature of a source the same."""
    whole = thresholds if thresholds.ndim == 2 else thresholds[:, None]
    transcoder.log_threshold.copy_(whole.log().expand_as(transcoder.log_threshold))
