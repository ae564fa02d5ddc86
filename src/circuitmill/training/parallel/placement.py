"""A state of a training in a checkpoint, whatever the layout it was saved from.

Parameters and what an optimizer keeps of them are saved as this rank's part of a whole; a layout with other parts reads
from the same files what it needs. What belongs to a rank alone has its number in the name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from circuitmill.core.transcoder import Transcoder
from circuitmill.stores.checkpoints import Entry, Part
from circuitmill.training.parallel.layout import Layout

_BY_FEATURE = ("idle", "density")
"""[source feature]"""
_OF_RANK = ("random_state", "cuda_random_state")


@dataclass(frozen=True)
class _Stretch:
    """`count` rows of a whole tensor along an axis, from `start` on."""

    axis: int
    start: int
    count: int
    whole: tuple[int, ...]

    @property
    def here(self) -> tuple[int, ...]:
        """Shape of what this rank has."""
        return (*self.whole[: self.axis], self.count, *self.whole[self.axis + 1 :])


class Placement:
    """Which stretch of each whole tensor of a state is on this rank.

    Args:
        transcoder: What this rank trains.
        layout: Of the training.
    """

    def __init__(self, transcoder: Transcoder, layout: Layout) -> None:
        self._rank = layout.ranks.rank
        self._stretches: dict[str, _Stretch] = {}
        shard, axes = layout.shard, transcoder.feature_axes() if layout.features.size > 1 else {}
        for name, value in transcoder.named_parameters():
            if isinstance(value, DTensor):
                axis = value.placements[0].dim  # type: ignore[attr-defined]
                here, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
                self._stretches[name] = _Stretch(axis, offset[axis], here[axis], tuple(value.shape))
            elif axes.get(name) is not None:
                axis, whole = int(axes[name] or 0), list(value.shape)
                whole[axis] = shard.total
                self._stretches[name] = _Stretch(axis, shard.first, shard.n_features, tuple(whole))
        if layout.features.size > 1:
            whole = (transcoder.n_sources, shard.total)
            own = _Stretch(1, shard.first, shard.n_features, whole)
            self._stretches |= dict.fromkeys(_BY_FEATURE, own)

    def entries(self, tensors: dict[str, Tensor]) -> dict[str, Entry]:
        """The tensors of a state as parts of whole ones."""
        found: dict[str, Entry] = {}
        for name, tensor in tensors.items():
            stretch = self._stretch(name)
            own = name if name not in _OF_RANK else f"{name}.{self._rank}"
            if stretch is None or tensor.shape != stretch.here:
                found[own] = tensor
            else:
                found[own] = Part(tensor, stretch.axis, stretch.start, stretch.whole[stretch.axis])
        return found

    def wanted(self, saved: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Entry]:
        """Empty tensors for what this rank needs of a checkpoint with these whole tensors."""
        found: dict[str, Entry] = {}
        for name, (shape, dtype) in saved.items():
            base, _, rank = name.rpartition(".")
            if base in _OF_RANK and rank != str(self._rank):
                continue
            stretch = self._stretch(name)
            if stretch is not None and shape == stretch.whole:
                part = torch.empty(stretch.here, dtype=dtype)
                found[name] = Part(part, stretch.axis, stretch.start, shape[stretch.axis])
            else:
                found[name] = torch.empty(shape, dtype=dtype)
        return found

    def tensors(self, entries: dict[str, Entry]) -> dict[str, Tensor]:
        """What `TrainState.restore` takes."""
        found = {}
        for name, entry in entries.items():
            base, _, _ = name.rpartition(".")
            found[base if base in _OF_RANK else name] = entry.tensor if isinstance(entry, Part) else entry
        return found

    def _stretch(self, name: str) -> "_Stretch | None":
        return self._stretches.get(name.split("/")[-1] if "/" in name else name.removeprefix("parameter."))
