"""Batches for one rank: its slice of every global batch, normalised and on the device, read one step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.scaling import Scaling
from circuitmill.distributed import Ranks
from circuitmill.training.parallel import batch_slice

Pair = tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]


@runtime_checkable
class Source(Protocol):
    """Where activations come from: a store of a cache, or memory."""

    def batch(self, index: int) -> Pair:
        """MLP inputs and outputs of the tokens of global batch `index`; always the same for the same index."""
        ...


class Batches:
    """Addressed by step; the next step's batch is read while this one is worked on.

    One background thread reads, and no other touches the source. Use as a context manager, which ends the thread.
    """

    def __init__(
        self, source: Source, scaling: Scaling, *, batch_tokens: int, ranks: Ranks, device: torch.device
    ) -> None:
        self._source, self._device = source, device
        self._scaling = scaling.to(device)
        self._rows = batch_slice(batch_tokens, ranks)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Pair]] | None = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def whole(self, index: int) -> Pair:
        """A normalised batch with the tokens of all ranks, read now."""
        return self._normalise(self._reader.submit(self._source.batch, index).result())

    def get(self, index: int) -> Pair:
        """This rank's part of a normalised batch; starts reading the one after it."""
        if self._next is None or self._next[0] != index:
            self._next = (index, self._reader.submit(self._source.batch, index))
        x, y = self._next[1].result()
        self._next = (index + 1, self._reader.submit(self._source.batch, index + 1))
        return self._normalise((x[self._rows], y[self._rows]))

    def _normalise(self, pair: Pair) -> Pair:
        x, y = (side.to(self._device, non_blocking=True) for side in pair)
        return self._scaling.inputs(x), self._scaling.outputs(y)
