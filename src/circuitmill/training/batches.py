"""Batches for one rank: its slice of every global batch, restored and normalised on the device, read one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.codecs import StoredBatch
from circuitmill.core.scaling import Scaling
from circuitmill.errors import ShapeError

Pair = tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]
Targets = Callable[[Float[Tensor, "token layer d_model"]], Float[Tensor, "token layer d_model"]]
"""From MLP inputs to MLP outputs."""


@runtime_checkable
class Source(Protocol):
    """Where activations come from: a store of a cache, a running model, or memory."""

    def batch(self, index: int) -> StoredBatch:
        """This rank's tokens of global batch `index`; always the same for the same index."""
        ...


class Batches:
    """Addressed by step; the next step's batch is read while this one is worked on.

    One background thread reads, and no other touches the source. What travels to the device are stored numbers;
    they are restored there. Use as a context manager, which ends the thread.

    Args:
        source: Of this rank's rows.
        scaling: To normalised units.
        device: Where the trainer works.
        targets: Computes MLP outputs, for a source that has inputs alone.
        reproduces: Whether what is read is what is to be reconstructed, for a source that has inputs alone.
    """

    def __init__(
        self,
        source: Source,
        scaling: Scaling,
        *,
        device: torch.device,
        targets: Targets | None = None,
        reproduces: bool = False,
    ) -> None:
        if reproduces and targets is not None:
            raise _unclear("a function that computes others")
        self._source, self._device, self._targets, self._reproduces = source, device, targets, reproduces
        self._scaling = scaling.to(device)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[StoredBatch]] | None = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def get(self, index: int) -> Pair:
        """This rank's part of a normalised batch; starts reading the one after it.

        Raises:
            ShapeError: the batch has no outputs and nothing says which, or has some that nobody asked for.
        """
        if self._next is None or self._next[0] != index:
            self._next = (index, self._read(index))
        batch = self._next[1].result()
        self._next = (index + 1, self._read(index + 1))
        return self._restored(batch)

    def _read(self, index: int) -> Future[StoredBatch]:
        return self._reader.submit(self._fetch, index)

    def _fetch(self, index: int) -> StoredBatch:
        batch = self._source.batch(index)
        return batch.pinned() if self._device.type == "cuda" else batch

    def _restored(self, batch: StoredBatch) -> Pair:
        x = batch.inputs.to(self._device).decode()
        if self._reproduces:
            if batch.outputs is not None:
                raise _unclear("outputs in the batch")
            y = x
        elif batch.outputs is not None:
            y = batch.outputs.to(self._device).decode()
        elif self._targets is not None:
            y = self._targets(x)
        else:
            raise ShapeError(
                "MLP outputs in the batch, or a function that computes them",
                found="neither",
                where="train",
                fix="pass the model's MLPs for a cache with targets=recomputed, reproduces for one with targets=inputs",
            )
        return self._scaling.inputs(x), self._scaling.outputs(y)


def _unclear(found: str) -> ShapeError:
    return ShapeError(
        "inputs alone, which are to be reconstructed",
        found=found,
        where="train",
        fix="train a transcoder that reproduces what it reads on a cache with targets=inputs",
    )
