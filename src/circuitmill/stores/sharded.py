"""Named tensors of which every rank has a stretch, in safetensors files that any number of ranks can read.

    shard-00001-model-00001-of-00002.safetensors     first of the two files that rank 0 wrote

torch.distributed.checkpoint writes and reads them. Here is what it leaves open: which rank writes what all of them
have, how large a file may be, and which stretches are needed. The whole of a tensor is the union of the stretches
that the files say they hold; no pickle is written or read.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from circuitmill.errors import StoreError
from circuitmill.stores.tensors import sort_metadata

FILE_BYTES = 256 * 2**20
"""Size of a file. Larger tensors are cut, because a file is put together in memory."""

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor along one axis, as one rank has it.

    Args:
        tensor: The values of the stretch.
        start: Position of its first row along the axis.
        total: Length of the whole tensor along the axis.
    """

    tensor: Tensor
    axis: int
    start: int
    total: int


Entry = Tensor | Part
"""A plain tensor is the same on all ranks that have its name."""


@dataclass(frozen=True)
class Extent:
    """What an entry says about itself without its values; `axis` is None for a plain tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    axis: int | None = None
    start: int = 0
    length: int = 0

    @property
    def offsets(self) -> tuple[int, ...]:
        """Position of the first element in the whole."""
        return tuple(self.start if axis == self.axis else 0 for axis in range(len(self.shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the stretch."""
        return tuple(self.length if axis == self.axis else size for axis, size in enumerate(self.shape))

    @property
    def bytes(self) -> int:
        """Memory of the stretch."""
        return math.prod(self.sizes) * self.dtype.itemsize


def values_of(entry: Entry) -> Tensor:
    """The tensor that a rank has."""
    return (entry.tensor if isinstance(entry, Part) else entry).detach()


def extent_of(name: str, entry: Entry) -> Extent:
    """What an entry says about itself.

    Raises:
        StoreError: a part does not lie inside its whole.
    """
    if not isinstance(entry, Part):
        return Extent(tuple(entry.shape), entry.dtype)
    shape, axis = list(entry.tensor.shape), entry.axis
    if not (0 <= axis < len(shape) and 0 <= entry.start <= entry.total - shape[axis]):
        raise StoreError(
            f"a part inside its whole: 0 <= axis < {len(shape)}, 0 <= start, start + length <= total",
            found=f"shape {tuple(shape)}, axis {axis}, start {entry.start}, total {entry.total}",
            where=name,
            fix="give the part the axis and the place that it was cut from",
        )
    length, shape[axis] = shape[axis], entry.total
    return Extent(tuple(shape), entry.tensor.dtype, axis, entry.start, length)


def shares(extents: Sequence[Mapping[str, Extent]], where: Path) -> list[list[str]]:
    """Names that each rank writes: every stretch once, replicated ones by the rank that has least to write.

    Args:
        extents: What every rank has.

    Raises:
        StoreError: ranks disagree about a tensor, or their stretches overlap or leave a gap.
    """
    wholes: dict[str, Extent] = {}
    holders: dict[str, dict[tuple[int, int], list[int]]] = {}
    for rank, mine in enumerate(extents):
        for name, extent in mine.items():
            first = wholes.setdefault(name, extent)
            said, known = ((e.shape, e.dtype, e.axis) for e in (extent, first))
            if said != known:
                raise StoreError(
                    f"{name} with one (shape, dtype, axis) on all ranks, like {known}",
                    found=f"{said} on rank {rank}",
                    where=where,
                    fix="save the same tensor on all ranks, or under another name",
                )
            stretches = holders.setdefault(name, {})
            # a rank without rows says nothing, unless the whole has none
            if extent.axis is None or extent.length or not extent.shape[extent.axis]:
                stretches.setdefault((extent.start, extent.length), []).append(rank)
    for name, stretches in holders.items():
        _check_tiling(name, wholes[name], sorted(stretches), where)
    load, names = [0] * len(extents), [[] for _ in extents]
    wanted = [(ranks, name) for name, stretches in holders.items() for ranks in stretches.values()]
    sizes = [(len(ranks), -extents[ranks[0]][name].bytes, name, ranks) for ranks, name in wanted]
    for _, negative, name, ranks in sorted(sizes):
        writer = min(ranks, key=lambda rank: load[rank])
        load[writer] -= negative
        names[writer].append(name)
    return [sorted(mine) for mine in names]


def _check_tiling(name: str, whole: Extent, stretches: list[tuple[int, int]], where: Path) -> None:
    if whole.axis is None:
        return
    position = 0
    for start, length in [*stretches, (whole.shape[whole.axis], 0)]:
        if start != position:
            raise StoreError(
                f"stretches of {name} that follow each other up to {whole.shape[whole.axis]} on axis {whole.axis}",
                found=f"one that ends at {position} and one that starts at {start}",
                where=where,
                fix="give every rank's part its place in the whole",
            )
        position = start + length


@dataclass(frozen=True)
class Piece:
    """Consecutive values of a tensor in host memory, small enough for a file."""

    values: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""


def stage(state: Mapping[str, Entry], names: Sequence[str]) -> dict[MetadataIndex, Piece]:
    """Copies in host memory of what a rank writes; nothing is shared with the state afterwards."""
    pieces: dict[MetadataIndex, Piece] = {}
    devices = set()
    for name in names:
        extent = extent_of(name, state[name])
        for values, offsets in _cut(values_of(state[name]), extent.offsets):
            # pinned memory, or else every copy from the device waits for the one before
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            host.copy_(values, non_blocking=True)
            pieces[MetadataIndex(name, offsets)] = Piece(host, extent.shape)
            devices |= {values.device} if values.is_cuda else set()
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return pieces


def _cut(values: Tensor, offsets: tuple[int, ...]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Views of at most FILE_BYTES with their places, cut along the first axes."""
    if values.nbytes <= FILE_BYTES or values.numel() == 1:
        yield values, offsets
        return
    axis = next(axis for axis, size in enumerate(values.shape) if size > 1)
    rows = max(1, FILE_BYTES * values.shape[axis] // values.nbytes)
    for start in range(0, values.shape[axis], rows):
        length = min(rows, values.shape[axis] - start)
        moved = (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :])
        yield from _cut(values.narrow(axis, start, length), moved)


def write(folder: Path, pieces: Mapping[MetadataIndex, Piece], group: dist.ProcessGroup | None) -> None:
    """Write the pieces of all ranks of a group; without one those of this process.

    Files are not synced to disk.

    Raises:
        CheckpointException: on all ranks, when one could not write.
    """
    _silence()
    dcp.save(
        {},
        storage_writer=_Writer(folder),
        planner=_SavePlanner(pieces),
        process_group=group,
        no_dist=group is None,
    )


def read_metadata(folder: Path) -> Metadata:
    """Which stretches of which tensors the files of a folder hold."""
    return HuggingFaceStorageReader(str(folder)).read_metadata()


def missing(metadata: Metadata, name: str, extent: Extent) -> int:
    """How many elements of a stretch no file holds."""
    return math.prod(extent.sizes) - sum(math.prod(item.lengths) for item in _items(metadata, name, extent))


def read(folder: Path, metadata: Metadata, wanted: Mapping[str, Entry]) -> None:
    """Fill tensors from the files of a folder; this rank by itself.

    Raises:
        CheckpointException: a file could not be read.
    """
    _silence()
    dcp.load({}, storage_reader=_Reader(folder, metadata), planner=_LoadPlanner(wanted, metadata), no_dist=True)


def file_prefix(rank: int) -> str:
    """How the names of the files begin that a rank writes."""
    return f"shard-{rank + 1:05d}-"


def _silence() -> None:
    """No warning about one process without torch.distributed, which is what was asked for.

    A filter for good instead of warnings.catch_warnings, which is not safe in a thread.
    """
    message = "torch.distributed is disabled, unavailable or uninitialized"
    warnings.filterwarnings("ignore", message, UserWarning, r"torch\.distributed\.checkpoint\b")


def _items(metadata: Metadata, name: str, extent: Extent) -> list[ReadItem]:
    chunk = ChunkStorageMetadata(torch.Size(extent.offsets), torch.Size(extent.sizes))
    saved = metadata.state_dict_metadata[name]
    return create_read_items_for_chunk_list(name, saved, [chunk]) if isinstance(saved, TensorStorageMetadata) else []


class _SavePlanner(DefaultSavePlanner):
    """Writes pieces instead of a state dict."""

    def __init__(self, pieces: Mapping[MetadataIndex, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(index, piece) for index, piece in self.pieces.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index].values

    def _item(self, index: MetadataIndex, piece: Piece) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(index.offset or ()), piece.values.shape)
        properties = TensorProperties.create_from_tensor(piece.values)
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    """Fills entries instead of a state dict."""

    def __init__(self, wanted: Mapping[str, Entry], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.wanted, self.metadata = wanted, metadata

    def set_up_planner(
        self, state_dict: object, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the state dict is empty."""

    def create_local_plan(self) -> LoadPlan:
        extents = {name: extent_of(name, entry) for name, entry in self.wanted.items()}
        return LoadPlan([item for name, extent in extents.items() for item in _items(self.metadata, name, extent)])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return values_of(self.wanted[index.fqn])


class _Reader(HuggingFaceStorageReader):
    """Does not open all files again to see what is in them."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._known = metadata

    def read_metadata(self) -> Metadata:
        self._known.storage_meta = StorageMeta(load_id=self.load_id)
        return self._known


class _Writer(HuggingFaceStorageWriter):
    """Splits what a rank writes over files of FILE_BYTES.

    The base class maps a name to one file, in which two pieces of one tensor would replace each other.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.sync_files = False  # it syncs before the last bytes have left Python's buffer; the caller does it
        self.per_thread_copy_ahead = 0  # else it opens a context on the first CUDA device, which is another rank's

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files, done = _files(plan.items), []
        for number, items in enumerate(files, start=1):
            # the largest number of the mapping becomes the "of-" in the names
            numbers = {"": len(files)} | {item.index.fqn: number for item in items}
            storage = {**plan.storage_data, "fqn_to_index_mapping": numbers}
            try:
                made = super().write_data(replace(plan, items=items, storage_data=storage), planner).value()
                for name in {result.storage_data.relative_path for result in made}:
                    sort_metadata(Path(str(self.path)) / name)
                done += made
            except Exception as error:
                # it travels to all ranks, which not every error can
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(done)
        return future


def _files(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Items in order, a new file when one is full or has the name already."""
    files: list[list[WriteItem]] = []
    names: set[str] = set()
    room = 0
    for item in items:
        data = item.tensor_data
        size = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize if data else 0
        if not files or size > room or item.index.fqn in names:
            files.append([])
            names, room = set(), FILE_BYTES
        files[-1].append(item)
        names.add(item.index.fqn)
        room -= size
    return files
