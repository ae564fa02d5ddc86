"""Batches for one rank: its slice of every global batch, restored and normalised on the device, read one step ahead.

Ranks that share features work on the same tokens. Each reads some of them, and they exchange them as they are stored:
so a batch is read once, by all ranks together, and what travels is as small as what is on disk.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from circuitmill.core.codecs import Encoded, StoredBatch
from circuitmill.core.scaling import Scaling
from circuitmill.errors import ShapeError
from circuitmill.training.parallel.collectives import Group

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
        together: Ranks whose rows are put together, first rank first; every rank must ask for the same batches.
    """

    def __init__(
        self,
        source: Source,
        scaling: Scaling,
        *,
        device: torch.device,
        targets: Targets | None = None,
        reproduces: bool = False,
        together: Group | None = None,
    ) -> None:
        if reproduces and targets is not None:
            raise _unclear("a function that computes others")
        self._source, self._device, self._targets, self._reproduces = source, device, targets, reproduces
        self._scaling, self._together = scaling.to(device), together or Group()
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
        inputs = batch.inputs.to(self._device)
        outputs = None if batch.outputs is None else batch.outputs.to(self._device)
        own = inputs
        if self._together.size > 1:
            inputs, outputs = _all_rows(inputs, outputs, self._together)
        x = inputs.decode()
        if self._reproduces:
            if outputs is not None:
                raise _unclear("outputs in the batch")
            y = x
        elif outputs is not None:
            y = outputs.decode()
        elif self._targets is not None:
            # of its own rows only: outputs are exchanged like inputs
            y = self._together.gather_rows(self._targets(x if own is inputs else own.decode()))
        else:
            raise ShapeError(
                "MLP outputs in the batch, or a function that computes them",
                found="neither",
                where="train",
                fix="pass the model's MLPs for a cache with targets=recomputed, reproduces for one with targets=inputs",
            )
        return self._scaling.inputs(x), self._scaling.outputs(y)


def _all_rows(inputs: Encoded, outputs: Encoded | None, group: Group) -> tuple[Encoded, Encoded | None]:
    """The stored numbers of all ranks, in one collective."""
    sides = [inputs] if outputs is None else [inputs, outputs]
    arrays = [(side, name, value) for side, each in enumerate(sides) for name, value in each.arrays.items()]
    rows = [value.reshape(len(value), -1).contiguous().view(torch.uint8) for _, _, value in arrays]
    parts = group.gather_rows(torch.cat(rows, dim=1)).split([row.shape[1] for row in rows], dim=1)
    found: list[dict[str, Tensor]] = [{} for _ in sides]
    for (side, name, value), part in zip(arrays, parts, strict=True):
        found[side][name] = _numbers(part, value.dtype).unflatten(1, value.shape[1:])
    whole = [replace(each, arrays=arrays) for each, arrays in zip(sides, found, strict=True)]
    return whole[0], whole[1] if len(whole) > 1 else None


def _numbers(stored: UInt8[Tensor, "token byte"], dtype: torch.dtype) -> Shaped[Tensor, "token _"]:
    """What bytes stand for, where they are if they are aligned."""
    aligned = stored.stride(0) % dtype.itemsize == 0 and stored.storage_offset() % dtype.itemsize == 0
    return (stored if aligned else stored.contiguous()).view(dtype)


def _unclear(found: str) -> ShapeError:
    return ShapeError(
        "inputs alone, which are to be reconstructed",
        found=found,
        where="train",
        fix="train a transcoder that reproduces what it reads on a cache with targets=inputs",
    )
