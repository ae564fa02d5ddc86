"""The same layer with only the places that matter: features that fire, or nearly fire, on a token.

Outside the kernel of the straight-through derivative an inactive place contributes neither to the value nor
to any gradient of JumpReLU, decoder and sparsity. Keeping the places with h > theta - bandwidth / 2 is
therefore exact, and with few of them (some per cent) several times faster on a CPU than products with a
matrix that is nearly all zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitmill.core.parts import WHOLE, Parts

WORTHWHILE = 0.12
"""Share of kept places up to which this is faster than the dense product; measured by benchmarks/train_step.py."""


@dataclass(frozen=True)
class Entries:
    """Kept places of a [token feature] matrix, row by row."""

    flat: Int[Tensor, " entry"]
    """token * n_features + feature, ascending."""
    feature: Int[Tensor, " entry"]
    """Column of each entry."""
    offsets: Int[Tensor, " token"]
    """Number of entries before each token's first."""
    n_features: int
    """Columns of the matrix."""

    @property
    def n_tokens(self) -> int:
        """Rows of the matrix."""
        return self.offsets.shape[0]

    def gather(self, matrix: Float[Tensor, "token feature"]) -> Float[Tensor, " entry"]:
        """The matrix's values at these places."""
        return matrix.reshape(-1)[self.flat]


@torch.no_grad()
def places(kept: Bool[Tensor, "token feature"]) -> Entries:
    """The places that are true.

    >>> places(torch.tensor([[False, True], [True, False]])).feature
    tensor([1, 0])
    """
    return _entries(kept.flatten().nonzero().flatten(), *kept.shape)


def _entries(flat: Int[Tensor, " entry"], n_tokens: int, n_features: int) -> Entries:
    rows = torch.arange(n_tokens, device=flat.device) * n_features
    return Entries(flat, flat % n_features, torch.searchsorted(flat, rows), n_features)


@dataclass(frozen=True)
class Sparse:
    """`core.operand.Operand` of kept places; everywhere else the activation is zero."""

    entries: Entries
    values: Float[Tensor, " entry"]

    @property
    def n_tokens(self) -> int:
        """Rows."""
        return self.entries.n_tokens

    @property
    def n_features(self) -> int:
        """Columns."""
        return self.entries.n_features

    def times(self, weight: Float[Tensor, "feature column"]) -> Float[Tensor, "token column"]:
        """The matrix product: for each token the weighted sum of the rows of its entries, in the activations' type."""
        # weights may be stored in fewer bits, and no autocast applies here
        weight = weight.to(self.values.dtype)
        return nn.functional.embedding_bag(
            self.entries.feature, weight, self.entries.offsets, mode="sum", per_sample_weights=self.values
        )

    def adjusted(self, scale: Float[Tensor, " feature"] | None, offset: Float[Tensor, " feature"] | None) -> "Sparse":
        """Activations times a factor per feature, plus a number per feature where the feature is active."""
        index = self.entries.feature
        changed = self.values if scale is None else self.values * scale[index]
        return replace(self, values=changed if offset is None else changed + (self.values > 0) * offset[index])

    def within(self, span: slice) -> "Sparse":
        """The entries of a stretch of features, numbered from 0."""
        first, last, _ = span.indices(self.n_features)
        if (first, last) == (0, self.n_features):
            return self
        inside = ((self.entries.feature >= first) & (self.entries.feature < last)).nonzero().flatten()
        token = self.entries.flat[inside] // self.n_features
        flat = token * (last - first) + self.entries.feature[inside] - first
        return Sparse(_entries(flat, self.n_tokens, last - first), self.values[inside])

    def total(
        self, function: Callable[[Tensor], Tensor], weight: Float[Tensor, " feature"] | None = None
    ) -> Float[Tensor, ""]:
        """Sum of function(activation * weight) over tokens and features; the function must be 0 at 0."""
        return function(self.values if weight is None else self.values * weight[self.entries.feature]).sum()

    def firings(self) -> Int[Tensor, " feature"]:
        """Tokens on which each feature's activation is above zero."""
        fires = self.values.detach() > 0
        return torch.bincount(self.entries.feature[fires], minlength=self.n_features)

    def dense(self) -> Float[Tensor, "token feature"]:
        """The whole matrix."""
        whole = self.values.new_zeros(self.n_tokens * self.n_features)
        return whole.index_put((self.entries.flat,), self.values).view(self.n_tokens, self.n_features)


def strongest(
    pre: Float[Tensor, "token feature"], k: int, allowed: Bool[Tensor, " feature"], parts: Parts = WHOLE
) -> Sparse:
    """The k largest positive pre-activations of each token among the allowed features.

    >>> strongest(torch.tensor([[3.0, -1.0, 2.0, 1.0]]), 2, torch.tensor([False, True, True, True])).dense()
    tensor([[0., 0., 2., 1.]])

    Args:
        parts: Where the token's other features are; the k largest are of all of them.
    """
    chosen = allowed.nonzero().flatten()
    values, index = pre[:, chosen].relu().topk(min(k, len(chosen)), dim=1)
    feature = chosen[index]
    flat = torch.arange(len(pre), device=pre.device)[:, None] * pre.shape[1] + feature
    if parts is not WHOLE:
        kept = parts.largest(values.detach(), k, lambda: feature + parts.first)
        values, flat = values[kept], flat[kept]
    ordered, order = flat.flatten().sort()
    return Sparse(_entries(ordered, *pre.shape), values.flatten()[order])
