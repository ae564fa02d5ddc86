"""Histograms of positive numbers whose range is not known beforehand, one per feature."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class GrowingHistogram:
    """Counts positive values in equal bins from 0 to a power of two, which doubles if a value would not fit.

    Doubling merges neighbouring bins two by two. Scaling by powers of two is exact, so the result does not
    depend on the order of the values: the range ends at the smallest power of two above the largest value.

    >>> histogram = GrowingHistogram(n_features=1, n_bins=4)
    >>> histogram.update(torch.tensor([0, 0]), torch.tensor([0.5, 0.9]))
    >>> histogram.update(torch.tensor([0]), torch.tensor([3.0]))
    >>> histogram.counts, histogram.limit()
    (tensor([[2, 0, 0, 1]]), tensor([4.], dtype=torch.float64))
    """

    def __init__(self, n_features: int, n_bins: int, device: torch.device | None = None) -> None:
        self.n_bins = n_bins
        self.counts = torch.zeros(n_features, n_bins, dtype=torch.int64, device=device)
        self.maximum = torch.zeros(n_features, dtype=torch.float32, device=device)
        self.exponent = torch.full((n_features,), -127, dtype=torch.int64, device=device)
        """The range of feature f is [0, 2^exponent[f])."""

    def update(self, feature: Int[Tensor, " firing"], value: Float[Tensor, " firing"]) -> None:
        """Count values.

        Args:
            feature: The histogram each value goes to.
            value: Above zero and finite.
        """
        self.maximum.scatter_reduce_(0, feature, value, "amax")
        needed = torch.maximum(torch.frexp(self.maximum).exponent.long(), self.exponent)
        self._grow(torch.where(self.maximum > 0, needed, self.exponent))
        scaled = torch.ldexp(value.double(), -self.exponent[feature]) * self.n_bins
        cell = feature * self.n_bins + scaled.long()
        self.counts.view(-1).index_add_(0, cell, torch.ones_like(cell))

    def _grow(self, exponent: Int[Tensor, " feature"]) -> None:
        grown = (exponent > self.exponent).nonzero().squeeze(1)
        if grown.numel():
            # a shift by more than 62 bits is undefined; by 62 everything is in the first bin already
            shift = (exponent - self.exponent)[grown].clamp_max(62)
            cell = torch.arange(self.n_bins, device=shift.device).expand(len(grown), -1) >> shift[:, None]
            merged = torch.zeros_like(self.counts[grown]).scatter_add_(1, cell, self.counts[grown])
            self.counts[grown] = merged
        self.exponent = exponent

    def limit(self) -> Float[Tensor, " feature"]:
        """Upper end of each feature's range."""
        return torch.ldexp(torch.ones_like(self.maximum, dtype=torch.float64), self.exponent)

    def quantiles(self, shares: Float[Tensor, " bin"]) -> Float[Tensor, "feature bin"]:
        """The values below which given shares of a feature's values lie, evenly spread inside each bin.

        The error is at most one bin: 1/n_bins of the range, so 2/n_bins of the largest value. Zero for a
        feature without values.
        """
        cumulative = self.counts.cumsum(1).double()
        wanted = shares.double()[None] * cumulative[:, -1:]
        cell = torch.searchsorted(cumulative, wanted.contiguous()).clamp_max(self.n_bins - 1)
        inside = self.counts.gather(1, cell).double()
        below = cumulative.gather(1, cell) - inside
        position = cell + (wanted - below) / inside.clamp_min(1)
        values = position / self.n_bins * self.limit()[:, None]
        return torch.minimum(values, self.maximum[:, None].double())

    def bars(self, feature: int, n_bars: int) -> tuple[list[int], list[float]]:
        """One feature's histogram with at most `n_bars` equal bars up to its largest value; exact.

        Returns:
            The counts, and the edges (one more than counts); both empty for a feature without values.
        """
        largest = float(self.maximum[feature])
        if largest == 0:
            return [], []
        limit = 2.0 ** int(self.exponent[feature])
        used = int(largest / limit * self.n_bins) + 1
        width = -(-used // n_bars)
        n_used = -(-used // width)
        padded = torch.zeros(n_used * width, dtype=torch.int64)
        kept = self.counts[feature, : n_used * width].cpu()
        padded[: len(kept)] = kept
        step = width * limit / self.n_bins
        return padded.view(n_used, width).sum(1).tolist(), [step * edge for edge in range(n_used + 1)]
