"""What ranks send to each other. Everything goes through `Group`, which counts the bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@dataclass
class Wire:
    """Bytes that this rank has handed to collectives: the size of what goes in, whatever the algorithm makes of it."""

    n_bytes: int = 0


@dataclass(frozen=True)
class Group:
    """Ranks that work together; of one rank nothing is sent, and torch.distributed need not be initialised.

    Every rank of the group must call the same methods in the same order.
    """

    index: int = 0
    """Of this rank in the group."""
    size: int = 1
    handle: dist.ProcessGroup | None = None
    """None is the group of all ranks."""
    wire: Wire = field(default_factory=Wire)

    @torch.no_grad()
    def add_(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Replace contiguous values by their sum over ranks, which has the same bits on all of them."""
        if self.size > 1:
            self.wire.n_bytes += values.nbytes
            dist.all_reduce(values, group=self.handle)
        return values

    def total(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The sum over ranks, without a gradient."""
        return values if self.size == 1 else self.add_(values.detach().clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def begin_add_(self, values: Shaped[Tensor, "..."]) -> Callable[[], None]:
        """As `add_`, while this rank goes on working; the function that comes back waits for the sum."""
        self.wire.n_bytes += values.nbytes
        work: Any = dist.all_reduce(values, group=self.handle, async_op=True)
        return work.wait

    @torch.no_grad()
    def gather(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "rank ..."]:
        """The values of every rank, which have the same shape on all of them."""
        if self.size == 1:
            return values[None]
        self.wire.n_bytes += values.nbytes
        whole = values.new_empty((self.size, *values.shape))
        if values.is_cuda:
            dist.all_gather(list(whole.unbind(0)), values.contiguous(), group=self.handle)
            return whole
        # gloo gathers into memory of its own, which costs more than what travels; these arrive where they belong
        whole[self.index] = values
        sent: list[Any] = [
            dist.broadcast(part, group=self.handle, group_src=rank, async_op=True) for rank, part in enumerate(whole)
        ]
        for work in sent:
            work.wait()
        return whole

    def gather_rows(self, rows: Shaped[Tensor, "token ..."]) -> Shaped[Tensor, "all_tokens ..."]:
        """The rows of all ranks, first rank first; every rank must have as many."""
        return rows if self.size == 1 else self.gather(rows).flatten(0, 1)

    @torch.no_grad()
    def join(self, part: Shaped[Tensor, "..."], axis: int, total: int) -> Shaped[Tensor, "..."]:
        """The whole of which every rank has a chunk of ceil(total / ranks) along an axis, the last ones less."""
        if self.size == 1:
            return part
        chunk = -(-total // self.size)
        shape = list(part.shape)
        shape[axis] = chunk
        padded = part.new_zeros(shape)
        padded.narrow(axis, 0, part.shape[axis]).copy_(part.detach())
        return torch.cat(list(self.gather(padded).unbind(0)), dim=axis).narrow(axis, 0, total)

    def wait(self) -> None:
        """Return when every rank of the group has come to this line."""
        if self.size > 1:
            dist.barrier(group=self.handle)
