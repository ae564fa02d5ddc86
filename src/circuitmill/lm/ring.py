"""Memory that two processes share, in slots that are used again and again."""

import mmap
import os
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from circuitmill.core.codecs import Codec

_ALIGN = 64
"""Bytes; arrays begin at multiples of it."""


@dataclass(frozen=True)
class Slot:
    """Room for one block: token ids of its sequences, and the activations of its tokens as they are stored."""

    tokens: Int32[np.ndarray, "sequence pos"]
    values: dict[tuple[str, str], Shaped[np.ndarray, "token ..."]]
    """By place and array of the codec."""


class Ring:
    """Slots in memory that belongs to this process and to one that it is given to as an argument when it starts.

    The memory has no name in any folder: nothing is left of it however the two end.

    Args:
        n_slots: Slots; memory is taken from the system when a slot is first used.
        sequences: Most sequences of a block, and tokens in each.
        rows: Most tokens of a block.
        codec: Which arrays a place has.
        places: "inputs", "outputs".
    """

    def __init__(
        self, n_slots: int, sequences: tuple[int, int], rows: int, codec: Codec, places: tuple[str, ...]
    ) -> None:
        self._fields: list[tuple[tuple[str, str], str, tuple[int, ...]]] = [
            ((place, name), dtype, (rows, *shape))
            for place in places
            for name, (dtype, shape) in codec.arrays().items()
        ]
        self._sequences = sequences
        shapes = [("int32", sequences), *((dtype, shape) for _, dtype, shape in self._fields)]
        sizes = [np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in shapes]
        self._offsets = [0, *np.cumsum([-(-size // _ALIGN) * _ALIGN for size in sizes]).tolist()]
        self.n_slots, self.n_bytes = n_slots, n_slots * self._offsets[-1]
        self._file = _anonymous_file(self.n_bytes)
        self.slots = self._mapped()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": DupFd(self._file), "slots": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = state["_file"].detach()
        self.slots = self._mapped()
        self.close()

    def _mapped(self) -> list[Slot]:
        memory = mmap.mmap(self._file, self.n_bytes)
        return [self._slot(memory, number * self._offsets[-1]) for number in range(self.n_slots)]

    def _slot(self, memory: mmap.mmap, start: int) -> Slot:
        tokens = np.ndarray(self._sequences, np.int32, buffer=memory, offset=start)
        values = {
            key: np.ndarray(shape, dtype, buffer=memory, offset=start + offset)
            for (key, dtype, shape), offset in zip(self._fields, self._offsets[1:], strict=False)
        }
        return Slot(tokens, values)

    def close(self) -> None:
        """Give up the file, after which no other process can get it; the memory lives as long as its arrays."""
        os.close(self._file)


def _anonymous_file(n_bytes: int) -> int:
    """A file in memory without a name."""
    if sys.platform == "linux":
        # not a file in /dev/shm, which is limited to 64 MB in many containers
        file = os.memfd_create("circuitmill-stream")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, n_bytes)
    return file
