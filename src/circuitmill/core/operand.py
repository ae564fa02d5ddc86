"""Activations of one source's features as something to multiply with: dense here, or only the places that matter.

A decoder needs a product with a matrix, per-feature factors and offsets, and stretches of features; a loss needs sums
over a function that is zero at zero. Everything is written against this, so that each form exists once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Operand(Protocol):
    """A [token feature] matrix of activations."""

    @property
    def n_tokens(self) -> int:
        """Rows."""
        ...

    @property
    def n_features(self) -> int:
        """Columns."""
        ...

    def times(self, weight: Float[Tensor, "feature column"]) -> Float[Tensor, "token column"]:
        """The matrix product."""
        ...

    def adjusted(self, scale: Float[Tensor, " feature"] | None, offset: Float[Tensor, " feature"] | None) -> "Operand":
        """Activations times a factor per feature, plus a number per feature where the feature is active."""
        ...

    def within(self, span: slice) -> "Operand":
        """The columns of a stretch of features, numbered from 0."""
        ...

    def mapped(self, function: Callable[..., Tensor], *by_feature: Float[Tensor, " feature"]) -> "Operand":
        """function(value, one number of the feature each); it must be 0 wherever a place is not kept."""
        ...

    def total(
        self, function: Callable[[Tensor], Tensor], weight: Float[Tensor, " feature"] | None = None
    ) -> Float[Tensor, ""]:
        """Sum of function(activation * weight) over tokens and features; the function must be 0 at 0."""
        ...

    def by_token(self) -> Float[Tensor, " token"]:
        """Sum over features."""
        ...

    def by_feature(self) -> Float[Tensor, " feature"]:
        """Sum over tokens."""
        ...

    def firings(self) -> Int[Tensor, " feature"]:
        """Tokens on which each feature's activation is above zero."""
        ...

    def dense(self) -> Float[Tensor, "token feature"]:
        """The whole matrix."""
        ...


@dataclass(frozen=True)
class Dense:
    """All places."""

    values: Float[Tensor, "token feature"]

    @property
    def n_tokens(self) -> int:
        """Rows."""
        return self.values.shape[0]

    @property
    def n_features(self) -> int:
        """Columns."""
        return self.values.shape[1]

    def times(self, weight: Float[Tensor, "feature column"]) -> Float[Tensor, "token column"]:
        """The matrix product."""
        return self.values @ weight

    def adjusted(self, scale: Float[Tensor, " feature"] | None, offset: Float[Tensor, " feature"] | None) -> "Dense":
        """Activations times a factor per feature, plus a number per feature where the feature is active."""
        changed = self.values if scale is None else self.values * scale
        return Dense(changed if offset is None else changed + (self.values > 0) * offset)

    def within(self, span: slice) -> "Dense":
        """The columns of a stretch of features, numbered from 0."""
        return Dense(self.values[:, span])

    def mapped(self, function: Callable[..., Tensor], *by_feature: Float[Tensor, " feature"]) -> "Dense":
        """function(value, one number of the feature each)."""
        return Dense(function(self.values, *by_feature))

    def total(
        self, function: Callable[[Tensor], Tensor], weight: Float[Tensor, " feature"] | None = None
    ) -> Float[Tensor, ""]:
        """Sum of function(activation * weight) over tokens and features; the function must be 0 at 0."""
        return function(self.values if weight is None else self.values * weight).sum()

    def by_token(self) -> Float[Tensor, " token"]:
        """Sum over features."""
        return self.values.sum(dim=1)

    def by_feature(self) -> Float[Tensor, " feature"]:
        """Sum over tokens."""
        return self.values.sum(dim=0)

    def firings(self) -> Int[Tensor, " feature"]:
        """Tokens on which each feature's activation is above zero."""
        return (self.values.detach() > 0).sum(dim=0)

    def dense(self) -> Float[Tensor, "token feature"]:
        """The whole matrix."""
        return self.values
