"""What one pass over a corpus finds out about features, in memory that does not grow with the corpus.

1. Activations of whole sequences come in; only the (token, feature) pairs that fire are looked at further.
2. Counts, sums and a `GrowingHistogram` of activations are kept per feature.
3. The corpus is cut into windows. A window in which a feature fires is represented by its peak: the first
   token of largest activation, and a key of the text that ends there.
4. `BestWindows` keeps, per feature, the k windows of highest score among windows with different keys, so that
   a sentence that occurs a thousand times takes one place. Scored by activation they are the top windows;
   scored by a hash of key and feature they are a uniform sample of the different texts on which the feature
   fires.
5. A fixed-size uniform pool of windows remembers which features fire in it: where one does not, the window is
   silent for it.
6. `chosen` cuts the sample into evenly spaced ranks of activation (quantile windows) and names all windows to
   fetch.

Nothing depends on how the corpus was cut into batches, as long as each sequence is whole.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.core.hashing import mix, uniform
from circuitmill.core.histogram import GrowingHistogram

FINE_BINS = 512
"""Bins of the internal histogram: percentiles are exact to 1/256 of a feature's largest activation."""
SAMPLE_FACTOR = 8
"""Sampled windows per quantile window; the quantile windows are spread over the sample's ranks."""
SILENT_POOL = 256
"""Windows whose silence is remembered for every feature."""
QUANTILE_GROUPS = 4
"""Quantile windows are named by the quarter they come from: 0, 25, 50 or 75."""
KINDS = ("top", "quantile", "silent")


@dataclass(frozen=True)
class Chosen:
    """Windows to fetch, one entry per (feature, window); sorted by feature, kind, rank."""

    feature: Int[Tensor, " item"]
    kind: Int[Tensor, " item"]
    """Index into KINDS."""
    rank: Int[Tensor, " item"]
    """From 0; top: by activation, descending; quantile: by activation, ascending; silent: no meaning."""
    quantile: Int[Tensor, " item"]
    """Quantile windows: lower end, in percent, of the quarter of the sample, by activation; others: -1."""
    window: Int[Tensor, " item"]
    """As given to `Collector.update`."""


class BestWindows:
    """The k windows of highest score for every feature, no two with the same key.

    Of windows with one key the best is kept; equal scores go to the smaller window number. A key that is
    dropped and comes back with a higher score enters anew, so the result does not depend on the order of
    updates.
    """

    def __init__(self, n_features: int, k: int, device: torch.device | None = None) -> None:
        self.k = k
        self.score = torch.full((n_features, k), -torch.inf, dtype=torch.float64, device=device)
        self.value = torch.zeros(n_features, k, dtype=torch.float32, device=device)
        self.window = torch.full((n_features, k), -1, dtype=torch.int64, device=device)
        self.key = torch.zeros(n_features, k, dtype=torch.int64, device=device)
        self._pending: list[tuple[Tensor, ...]] = []
        self._n_pending = 0

    def update(
        self,
        feature: Int[Tensor, " item"],
        score: Float[Tensor, " item"],
        value: Float[Tensor, " item"],
        window: Int[Tensor, " item"],
        key: Int[Tensor, " item"],
    ) -> None:
        """Offer windows; each line is one window for one feature.

        They wait until there are as many as are held, because merging sorts all that is held.
        """
        if self.k == 0:
            return
        enters = (score >= self.score[feature, -1]).nonzero().squeeze(1)
        if enters.numel():
            self._pending.append(tuple(column[enters] for column in (feature, score, value, window, key)))
            self._n_pending += enters.numel()
        if self._n_pending >= self.score.numel():
            self.settle()

    def settle(self) -> None:
        """Merge what waits; to be called before reading."""
        if not self._pending:
            return
        held = (self.score > -torch.inf).nonzero(as_tuple=True)
        ours = (held[0], self.score[held], self.value[held], self.window[held], self.key[held])
        columns = zip(ours, *self._pending, strict=True)
        feature, score, value, window, key = (torch.cat(column) for column in columns)
        self._pending, self._n_pending = [], 0

        order = _sorted_by(feature, key, -score, window)
        order = order[_first_of_run(feature[order]) | _first_of_run(key[order])]
        order = order[_sorted_by(feature[order], -score[order], window[order])]
        place = _index_in_run(feature[order])
        order, place = order[place < self.k], place[place < self.k]

        at = feature[order], place
        self.score.fill_(-torch.inf)
        self.window.fill_(-1)
        self.score[at], self.value[at] = score[order], value[order]
        self.window[at], self.key[at] = window[order], key[order]


class SilentPool:
    """A uniform sample of windows, fixed in size, with what fires in each."""

    def __init__(self, n_features: int, size: int, seed: int, device: torch.device | None = None) -> None:
        self.seed = seed
        self.priority = torch.full((size,), torch.inf, dtype=torch.float64, device=device)
        self.window = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.fires = torch.ones(size, n_features, dtype=torch.bool, device=device)

    def update(self, window: Int[Tensor, " window"], fires: Bool[Tensor, "window feature"]) -> None:
        """Offer whole windows, each of them once."""
        priority = uniform(window, self.seed)
        enters = priority < self.priority.max()
        priority = torch.cat([self.priority, priority[enters]])
        keep = priority.argsort(stable=True)[: len(self.window)]
        self.priority = priority[keep]
        self.window = torch.cat([self.window, window[enters]])[keep]
        self.fires = torch.cat([self.fires, fires[enters]])[keep]

    def silent(self, feature: int, n_windows: int) -> Int[Tensor, " item"]:
        """Up to so many windows of the pool in which a feature does not fire; others for every feature."""
        candidates = self.window[~self.fires[:, feature]]
        order = uniform(mix(candidates) + feature, self.seed).argsort(stable=True)
        return candidates[order[:n_windows]]


class Collector:
    """Everything that one pass over one split finds out about a block of features."""

    def __init__(
        self,
        n_features: int,
        top: int,
        quantile: int,
        silent: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.n_features, self.n_quantile, self.n_silent, self.seed = n_features, quantile, silent, seed
        self.n_tokens = 0
        self.n_active = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.total = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.histogram = GrowingHistogram(n_features, FINE_BINS, device)
        self.top = BestWindows(n_features, top, device)
        self.sample = BestWindows(n_features, top + SAMPLE_FACTOR * quantile if quantile else 0, device)
        self.pool = SilentPool(n_features, SILENT_POOL if silent else 0, seed, device)

    @torch.no_grad()
    def update(
        self, a: Float[Tensor, "token feature"], window: Int[Tensor, " token"], key: Int[Tensor, " token"]
    ) -> None:
        """Take in the activations of some tokens.

        Args:
            a: Never negative.
            window: Number of the window each token lies in; tokens of a window stand together and come in one
                call.
            key: What the text that ends at each token hashes to (`hashing.text_keys`).
        """
        if a.shape[0] == 0:
            return
        self.n_tokens += a.shape[0]
        token, feature = a.nonzero(as_tuple=True)
        value = a[token, feature]
        self.n_active.index_add_(0, feature, torch.ones_like(feature))
        self.total.index_add_(0, feature, value.double())
        self.histogram.update(feature, value)

        numbers, place = torch.unique_consecutive(window, return_inverse=True)
        peak = torch.zeros(len(numbers) * self.n_features, dtype=a.dtype, device=a.device)
        cell = place[token] * self.n_features + feature
        peak.scatter_reduce_(0, cell, value, "amax")
        self._offer(peak, cell, token, value, numbers, key)
        if self.n_silent:
            self.pool.update(numbers, peak.view(len(numbers), -1) > 0)

    def _offer(
        self,
        peak: Float[Tensor, " item"],
        cell: Int[Tensor, " firing"],
        token: Int[Tensor, " firing"],
        value: Float[Tensor, " firing"],
        numbers: Int[Tensor, " window"],
        key: Int[Tensor, " token"],
    ) -> None:
        at_peak = value == peak[cell]
        first = torch.full(peak.shape, len(key), dtype=torch.int64, device=peak.device)
        first.scatter_reduce_(0, cell[at_peak], token[at_peak], "amin")
        fired = peak.nonzero().squeeze(1)
        feature, window = fired % self.n_features, numbers[fired // self.n_features]
        text = key[first[fired]]
        self.top.update(feature, peak[fired].double(), peak[fired], window, text)
        lottery = uniform(mix(text) + feature, self.seed)
        self.sample.update(feature, lottery, peak[fired], window, text)

    def chosen(self, features: Bool[Tensor, " feature"]) -> Chosen:
        """The windows to fetch for the features wanted.

        A feature that fires in fewer different texts than asked for has fewer windows; none is shown twice.
        """
        self.top.settle()
        self.sample.settle()
        parts: list[tuple[int, int, Tensor]] = []
        for feature in features.nonzero().squeeze(1).tolist():
            held = self.top.window[feature] >= 0
            parts.append((feature, 0, self.top.window[feature][held]))
            parts.append((feature, 1, self._quantile_windows(feature)))
            if self.n_silent:
                parts.append((feature, 2, self.pool.silent(feature, self.n_silent)))
        sizes = torch.tensor([len(windows) for _, _, windows in parts], dtype=torch.int64)
        size = sizes.repeat_interleave(sizes)
        kind = torch.tensor([kind for _, kind, _ in parts], dtype=torch.int64).repeat_interleave(sizes)
        empty = torch.zeros(0, dtype=torch.int64)
        rank = torch.cat([empty, *(torch.arange(len(windows)) for _, _, windows in parts)])
        quarter = (2 * rank + 1) * QUANTILE_GROUPS // (2 * size)
        return Chosen(
            feature=torch.tensor([feature for feature, _, _ in parts], dtype=torch.int64).repeat_interleave(sizes),
            kind=kind,
            rank=rank,
            quantile=torch.where(kind == 1, quarter * (100 // QUANTILE_GROUPS), -1),
            window=torch.cat([empty, *(windows.cpu() for _, _, windows in parts)]),
        )

    def _quantile_windows(self, feature: int) -> Int[Tensor, " item"]:
        if self.n_quantile == 0:
            return self.top.window[feature, :0]
        held = self.sample.window[feature] >= 0
        best = self.top.score[feature] > -torch.inf
        repeated = torch.isin(self.sample.key[feature], self.top.key[feature][best])
        candidates = (held & ~repeated).nonzero().squeeze(1)
        order = candidates[_sorted_by(self.sample.value[feature, candidates], self.sample.window[feature, candidates])]
        n_chosen = min(self.n_quantile, len(order))
        # centres of n equal parts of the ranks
        places = ((torch.arange(n_chosen, dtype=torch.float64) + 0.5) * len(order) / max(n_chosen, 1)).long()
        return self.sample.window[feature, order[places.to(order.device)]]


def _sorted_by(*columns: Tensor) -> Int[Tensor, " item"]:
    """The order that sorts rows by the first column, ties by the second, and so on."""
    order = columns[-1].argsort(stable=True)
    for column in reversed(columns[:-1]):
        order = order[column[order].argsort(stable=True)]
    return order


def _first_of_run(x: Int[Tensor, " item"]) -> Bool[Tensor, " item"]:
    first = torch.ones_like(x, dtype=torch.bool)
    first[1:] = x[1:] != x[:-1]
    return first


def _index_in_run(x: Int[Tensor, " item"]) -> Int[Tensor, " item"]:
    index = torch.arange(len(x), device=x.device)
    return index - torch.where(_first_of_run(x), index, 0).cummax(0).values
