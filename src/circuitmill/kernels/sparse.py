"""Activations of one source as the few places that matter: features that fire, or nearly fire, on a token.

Outside the kernel of the straight-through derivative an inactive place contributes neither to the value nor
to any gradient of JumpReLU, decoder and sparsity. Keeping the places with h > theta - bandwidth / 2 is
therefore exact, and with few of them several times faster than products with a matrix that is nearly all zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.kernels import operators
from circuitmill.kernels.entries import Entries

WORTHWHILE = {"cpu": 0.12, "cuda": 0.01}
"""Share of kept places up to which this is faster than the dense product, by kind of device.

On a CPU it is measured (benchmarks/train_step.py). On a GPU it is the ratio of what gathered rows and dense products
need at 3 TB/s and 500 TFLOP/s in bfloat16, which is .006, and some reuse of rows in the cache.
"""


@dataclass(frozen=True)
class Sparse:
    """`core.operand.Operand` of kept places; everywhere else the matrix counts as zero."""

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
        return operators.decode(self.values, self.entries, weight)

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
        inside = (self.entries.feature >= first) & (self.entries.feature < last)
        kept = self.entries.kept(inside)
        return Sparse(Entries(kept.feature - first, kept.offsets, last - first), self.values[inside])

    def mapped(self, function: Callable[..., Tensor], *by_feature: Float[Tensor, " feature"]) -> "Sparse":
        """function(value, one number of the feature each); it must be 0 wherever a place is not kept."""
        return replace(self, values=function(self.values, *(each[self.entries.feature] for each in by_feature)))

    def total(
        self, function: Callable[[Tensor], Tensor], weight: Float[Tensor, " feature"] | None = None
    ) -> Float[Tensor, ""]:
        """Sum of function(activation * weight) over tokens and features; the function must be 0 at 0."""
        return function(self.values if weight is None else self.values * weight[self.entries.feature]).sum()

    def by_token(self) -> Float[Tensor, " token"]:
        """Sum over features."""
        return self.values.new_zeros(self.n_tokens).index_add(0, self.entries.token, self.values)

    def by_feature(self) -> Float[Tensor, " feature"]:
        """Sum over tokens."""
        return self.values.new_zeros(self.n_features).index_add(0, self.entries.feature, self.values)

    def firings(self) -> Int[Tensor, " feature"]:
        """Tokens on which each feature's activation is above zero."""
        fires = self.values.detach() > 0
        return torch.bincount(self.entries.feature[fires], minlength=self.n_features)

    def dense(self) -> Float[Tensor, "token feature"]:
        """The whole matrix."""
        whole = self.values.new_zeros(self.n_tokens, self.n_features)
        return whole.index_put((self.entries.token, self.entries.feature), self.values)
