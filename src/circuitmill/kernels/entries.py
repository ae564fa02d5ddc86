"""Kept places of a [token feature] matrix, row by row and, for what adds up over tokens, by feature."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ByFeature:
    """The same places sorted by feature, tokens ascending within each."""

    order: Int[Tensor, " entry"]
    """Where each of them is among the entries."""
    token: Int[Tensor, " entry"]
    offsets: Int[Tensor, " _"]
    """Entries before each feature's first, and their number."""


@dataclass(frozen=True)
class Entries:
    """Places in compressed rows: token after token, features ascending."""

    feature: Int[Tensor, " entry"]
    """Column of each entry."""
    offsets: Int[Tensor, " _"]
    """Entries before each token's first, and their number."""
    n_features: int
    """Columns of the matrix."""

    @property
    def n_tokens(self) -> int:
        """Rows of the matrix."""
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.feature)

    @cached_property
    def token(self) -> Int[Tensor, " entry"]:
        """Row of each entry."""
        rows = torch.arange(self.n_tokens, device=self.feature.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.feature))

    @cached_property
    def by_feature(self) -> ByFeature:
        """Sorted by feature; once, however many gradients need it."""
        feature, order = self.feature.sort(stable=True)
        limits = torch.arange(self.n_features + 1, device=feature.device)
        return ByFeature(order, self.token[order], torch.searchsorted(feature, limits))

    def gather(self, matrix: Float[Tensor, "token feature"]) -> Float[Tensor, " entry"]:
        """The matrix's values at these places."""
        return matrix[self.token, self.feature]

    def kept(self, chosen: Bool[Tensor, " entry"]) -> "Entries":
        """Those that are true."""
        return from_places(self.token[chosen], self.feature[chosen], self.n_tokens, self.n_features)


@torch.no_grad()
def from_places(
    token: Int[Tensor, " entry"], feature: Int[Tensor, " entry"], n_tokens: int, n_features: int
) -> Entries:
    """Entries from rows and columns that are in order already."""
    limits = torch.arange(n_tokens + 1, device=token.device)
    return Entries(feature, torch.searchsorted(token, limits), n_features)


@torch.no_grad()
def places(kept: Bool[Tensor, "token feature"]) -> Entries:
    """The places that are true.

    >>> places(torch.tensor([[False, True], [True, False]])).feature
    tensor([1, 0])
    """
    flat = true_places(kept.flatten())
    n_tokens, n_features = kept.shape
    return from_places(flat // n_features, flat % n_features, n_tokens, n_features)


@torch.no_grad()
def true_places(kept: Bool[Tensor, " _"]) -> Int[Tensor, " _"]:
    """Where a mask is true, ascending.

    With few true places most groups of eight are zero as one 64-bit number, which is looked at first.

    >>> true_places(torch.tensor([False] * 9 + [True]))
    tensor([9])
    """
    whole = len(kept) // 8 * 8
    if kept.device.type != "cpu" or kept.storage_offset() % 8 or not whole:
        return kept.nonzero().flatten()
    group = kept[:whole].view(torch.int64).nonzero().flatten()
    inside = kept[:whole].view(-1, 8)[group].nonzero()
    first = group[inside[:, 0]] * 8 + inside[:, 1]
    return first if whole == len(kept) else torch.cat([first, kept[whole:].nonzero().flatten() + whole])
