"""Sums and rankings over ranks, as `core.parts` asks for them.

Sums. Every rank computes the loss from the same reconstruction, so the gradient by the sum is the gradient by each
summand, on its own rank: an all-reduce forward is the identity backward. With a second all-reduce backward, as
`torch.distributed.nn.all_reduce` has one, encoders, decoders and thresholds would get W times their gradient at W
ranks, and decoder biases, which are added after the sum, would not.

Rankings. A rank's k + 1 largest numbers of a row are all that it can contribute to the k + 1 largest of the whole row,
so these are gathered, over features and then over tokens. The k-th is the limit. Only if the next one equals it are
places looked at; all ranks see the same numbers, and so come to the same decision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from circuitmill.core.parts import Shard, largest
from circuitmill.training.parallel.collectives import Group

CPU = torch.device("cpu")
_LATER = 1 << 44
"""Places of one rank's tokens stand below it, those of the next rank's above."""
_TINY = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
"""The smallest number above zero."""


def _spare(partial: Tensor, dtype: torch.dtype) -> bool:
    """Whether a partial sum can be overwritten: it is the result of an operation, and nobody's parameter or part."""
    return partial.grad_fn is not None and partial._base is None and partial.is_contiguous() and partial.dtype == dtype


class _Total(torch.autograd.Function):
    """Sum over ranks; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        if not _spare(partial, dtype):
            sent = partial.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
            return group.add_(sent).to(partial.dtype)
        ctx.mark_dirty(partial)
        return group.add_(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Arrived(torch.autograd.Function):
    """A sum over ranks that has been computed meanwhile; the gradient passes to the summand."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, total: Tensor) -> Tensor:
        return total.to(partial.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Spread(torch.autograd.Function):
    """The value passes; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.total(gradient), None


@dataclass(frozen=True)
class Shards:
    """`core.parts.Parts` of a rank: its features among those of `features`, its tokens among those of `data`."""

    shard: Shard
    features: Group = field(default_factory=Group)
    """Ranks that have the same tokens and other features."""
    data: Group = field(default_factory=Group)
    """Ranks that have the same features and other tokens."""
    wire: torch.dtype | None = None
    """Type in which partial sums travel; None is their own."""
    overlap: bool = False
    device: torch.device = CPU
    ragged: bool = False
    """Whether ranks have unequal numbers of tokens, as whole sequences do."""

    @property
    def first(self) -> int:
        """Number of the first feature here."""
        return self.shard.first

    def n_features(self, here: int) -> int:
        """Features of a source over all ranks."""
        return self.shard.total

    def within(self, span: slice) -> slice:
        """The features of a stretch that are here."""
        return self.shard.within(span)

    def n_tokens(self, here: int) -> int:
        """Tokens over all ranks."""
        if not self.ragged:
            return here * self.data.size
        return int(self.data.total(torch.tensor([here], device=self.device)))

    def elsewhere(self, *, over_tokens: bool) -> bool:
        """Whether other ranks have more of a ranking."""
        return self.features.size > 1 or (over_tokens and self.data.size > 1)

    def total(self, partial: Float[Tensor, "..."], *, exact: bool = False) -> Float[Tensor, "..."]:
        """The sum over the ranks that share features; it may take the place of the partial sum."""
        if self.features.size == 1:
            return partial
        dtype = partial.dtype if exact or self.wire is None else self.wire
        return _Total.apply(partial, self.features, dtype)

    def over_tokens(self, values: Float[Tensor, " _"]) -> Float[Tensor, " _"]:
        """The sum over the ranks that have other tokens."""
        return self.data.total(values.detach())

    def begin(self, partial: Float[Tensor, "..."]) -> Callable[[], Float[Tensor, "..."]]:
        """As `total`, while this rank goes on working; the function that comes back waits for the sum."""
        if self.features.size == 1:
            return lambda: partial
        dtype = self.wire or partial.dtype
        sent = partial.detach()
        if not _spare(partial, dtype):
            sent = sent.to(dtype, memory_format=torch.contiguous_format, copy=True)
        wait = self.features.begin_add_(sent)

        def arrived() -> Tensor:
            wait()
            return _Arrived.apply(partial, sent)

        return arrived

    def spread(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same values; gradients are added up over the ranks that share features."""
        return whole if self.features.size == 1 else _Spread.apply(whole, self.features)

    @torch.no_grad()
    def largest(
        self,
        values: Float[Tensor, "row column"],
        k: int,
        order: Callable[[], Int[Tensor, "row column"]],
        *,
        over_tokens: bool = False,
    ) -> Bool[Tensor, "row column"]:
        """Where the k largest of each whole row are; of equal ones above zero, the first."""
        groups = [group for group in (self.features, self.data)[: 1 + over_tokens] if group.size > 1]
        if not groups:
            return largest(values, k)
        candidates = _first(values, k + 1, biggest=True, fill=0.0)
        for group in groups:
            candidates = _first(_columns(group, candidates), k + 1, biggest=True, fill=0.0)
        if k <= 0:
            return torch.zeros_like(values, dtype=torch.bool)
        ordered = candidates.sort(dim=1, descending=True).values
        least = ordered[:, k - 1 : k]
        kept = values >= least.clamp_min(_TINY[values.dtype])
        rows = ((ordered[:, k] == least[:, 0]) & (least[:, 0] > 0)).nonzero().flatten()
        if len(rows):
            room = k - (ordered[rows] > least[rows]).sum(dim=1)
            ties = values[rows] == least[rows]
            later = _LATER * self.data.index if over_tokens else 0
            last = _last_place(ties, order()[rows] + later, room, groups)
            kept[rows] = (values[rows] > least[rows]) | (ties & (order()[rows] + later <= last))
        return kept


def _first(values: Tensor, count: int, *, biggest: bool, fill: float | int) -> Shaped[Tensor, "row column"]:
    """The so many largest or smallest numbers of each row, filled up to as many if there are fewer."""
    found = values.topk(min(count, values.shape[1]), dim=1, largest=biggest, sorted=False).values
    missing = count - found.shape[1]
    return torch.cat([found, found.new_full((len(found), missing), fill)], dim=1) if missing else found


def _columns(group: Group, values: Tensor) -> Shaped[Tensor, "row column"]:
    """The columns of all ranks beside each other."""
    return values if group.size == 1 else torch.cat(list(group.gather(values).unbind(0)), dim=1)


def _last_place(
    ties: Bool[Tensor, "row column"],
    places: Int[Tensor, "row column"],
    room: Int[Tensor, " row"],
    groups: Sequence[Group],
) -> Int[Tensor, "row 1"]:
    """Place of the last of equal numbers for which there is room, by row."""
    most, never = int(room.max()), torch.iinfo(torch.int64).max
    found = _first(torch.where(ties, places, never), most, biggest=False, fill=never)
    for group in groups:
        found = _first(_columns(group, found), most, biggest=False, fill=never)
    return found.sort(dim=1).values.gather(1, room[:, None] - 1)
