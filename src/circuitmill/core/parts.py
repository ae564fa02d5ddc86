"""Where the rest of a transcoder's features and of a batch's tokens is.

The functions of this package see some features of every source and some tokens of a batch. Where a result depends on
the others they say so through `Parts`: a sum over features is a sum over shards of partial sums, what is kept of a
ranking depends on the ranking of all. `WHOLE` stands for a process that has everything; who has less brings its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A stretch of the features of each source: first, first + 1 ... last - 1 of `total`."""

    first: int
    last: int
    total: int

    @property
    def n_features(self) -> int:
        """Features here."""
        return self.last - self.first

    def within(self, span: slice) -> slice:
        """The features of a stretch that are here, numbered from this shard's first; the stretch may be empty.

        >>> Shard(4, 8, 12).within(slice(0, 6))
        slice(0, 2, None)
        """
        low, high, _ = span.indices(self.total)
        low, high = (min(max(place - self.first, 0), self.n_features) for place in (low, high))
        return slice(low, high)


@runtime_checkable
class Parts(Protocol):
    """A process among those that share features, tokens or both."""

    @property
    def first(self) -> int:
        """Number of the first feature here."""
        ...

    def n_features(self, here: int) -> int:
        """Features of a source over all shards, of which `here` are in this process."""
        ...

    def within(self, span: slice) -> slice:
        """The features of a stretch that are here, numbered from the first one here."""
        ...

    def n_tokens(self, here: int) -> int:
        """Tokens of the batch, of which `here` are in this process."""
        ...

    def elsewhere(self, *, over_tokens: bool) -> bool:
        """Whether other processes have more of a ranking: other features or, if it is over tokens, other tokens."""
        ...

    def total(self, partial: Float[Tensor, "..."], *, exact: bool = False) -> Float[Tensor, "..."]:
        """The sum over shards. Each summand gets the gradient of the sum, and that once: not once per shard.

        What is computed from the sum is computed by all processes alike, so that none needs the others' gradients.

        Args:
            partial: The summand of the features here.
            exact: Whether it must not travel in fewer bits than it has; counts must not.
        """
        ...

    def over_tokens(self, values: Float[Tensor, " _"]) -> Float[Tensor, " _"]:
        """The sum over processes that have other tokens, without a gradient."""
        ...

    @property
    def overlap(self) -> bool:
        """Whether sums are to be begun as early as possible, with `begin`."""
        ...

    def begin(self, partial: Float[Tensor, "..."]) -> Callable[[], Float[Tensor, "..."]]:
        """As `total`, while this process goes on working; the function that comes back waits for the sum."""
        ...

    def spread(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same values; the gradients that the shards' features send back are added up."""
        ...

    def largest(
        self,
        values: Float[Tensor, "row column"],
        k: int,
        order: Callable[[], Int[Tensor, "row column"]],
        *,
        over_tokens: bool = False,
    ) -> Bool[Tensor, "row column"]:
        """Where the k largest of each row are, a row being continued in other processes; of equal ones, the first.

        Args:
            values: Not negative. Zeros may be kept or not: they are worth nothing.
            k: Of the whole row.
            order: What decides between equal ones: their places in the row, ascending, counted with the features of all
                shards and the tokens that are here; asked for when there are some.
            over_tokens: Whether a row goes on with the tokens of other processes, besides their features.
        """
        ...


class Whole:
    """All features and all tokens are here."""

    first = 0
    overlap = False

    def n_features(self, here: int) -> int:
        """All of them."""
        return here

    def within(self, span: slice) -> slice:
        """The stretch itself."""
        return span

    def n_tokens(self, here: int) -> int:
        """All of them."""
        return here

    def elsewhere(self, *, over_tokens: bool) -> bool:
        """Nobody has."""
        return False

    def total(self, partial: Float[Tensor, "..."], *, exact: bool = False) -> Float[Tensor, "..."]:
        """There is nothing to add."""
        return partial

    def over_tokens(self, values: Float[Tensor, " _"]) -> Float[Tensor, " _"]:
        """There is nothing to add."""
        return values.detach()

    def begin(self, partial: Float[Tensor, "..."]) -> Callable[[], Float[Tensor, "..."]]:
        """There is nothing to wait for."""
        return lambda: partial

    def spread(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """There are no other shards."""
        return whole

    def largest(
        self,
        values: Float[Tensor, "row column"],
        k: int,
        order: Callable[[], Int[Tensor, "row column"]],
        *,
        over_tokens: bool = False,
    ) -> Bool[Tensor, "row column"]:
        """Columns are in order already."""
        return largest(values, k)


WHOLE = Whole()


@torch.no_grad()
def largest(values: Float[Tensor, "row column"], k: int) -> Bool[Tensor, "row column"]:
    """Where the k largest numbers of each row are; of equal ones, the first.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    tensor([[False,  True,  True, False]])
    """
    k = min(k, values.shape[1])
    if k <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    # kthvalue takes the k-th smallest
    least = values.kthvalue(values.shape[1] - k + 1, dim=1, keepdim=True).values
    kept = values >= least
    rows = (kept.sum(dim=1) > k).nonzero().flatten()
    if len(rows):
        above, ties = values[rows] > least[rows], values[rows] == least[rows]
        room = k - above.sum(dim=1, keepdim=True)
        kept[rows] = above | (ties & (ties.cumsum(dim=1) <= room))
    return kept


def spans_of(prefixes: Sequence[int], n_features: int) -> list[slice]:
    """Stretches between Matryoshka prefixes; one stretch if there are none.

    >>> spans_of((2, 5), 5)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(low, high) for low, high in pairwise([0, *(prefixes or (n_features,))])]
