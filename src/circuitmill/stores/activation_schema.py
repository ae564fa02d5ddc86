"""The layout of a shard of activations: one Zarr v3 group, written once, checked on every read.

    activations.zarr/
      sequence   int64 [token]           sequence of the token store
      position   int32 [token]           position in it
      token_id   int32 [token]
      inputs/    arrays of the codec, [token ...]; center, scale [layer d_model] and step [layer]
      outputs/   the same; absent if targets are recomputed, or are the inputs

Every array is split into files of `chunks_per_file` chunks (Zarr's sharding codec). Each chunk carries a crc32c; so
does the index of each file. `chunks.json` beside the group notes them all: a chunk counts only in the place it was
written for.

Tokens lie in corpus order up to the files: within the rows of one file they are shuffled, so that a chunk holds tokens
of many documents. The provenance arrays say which row is which token.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Int64, Shaped
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.array import Array
from zarr.core.group import Group

from circuitmill.core.codecs import Channels, Codec
from circuitmill.errors import StoreError
from circuitmill.stores.files import make_durable

SCHEMA_VERSION = 2
GROUP = "activations.zarr"
CHUNKS = "chunks.json"
PLACES = ("inputs", "outputs")
PROVENANCE = {"sequence": "int64", "position": "int32", "token_id": "int32"}
CONSTANTS = ("center", "scale", "step")
_ENTROPY_LEVEL = 1
"""Of zstd, for codes that must be entropy coded and for provenance."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a shard lie in chunks and files."""

    n_rows: int
    chunk: int
    """Tokens in a chunk of the codec's arrays."""
    chunks_per_file: int
    compression_level: int
    """Of zstd; 0 compresses only what must be."""

    @property
    def file_rows(self) -> int:
        """Tokens in a file: the window in which tokens are shuffled."""
        return self.chunk * self.chunks_per_file

    @property
    def n_files(self) -> int:
        """Files of each array."""
        return -(-self.n_rows // self.file_rows)

    def span(self, file: int) -> tuple[int, int]:
        """First and one past the last row of a file."""
        return file * self.file_rows, min((file + 1) * self.file_rows, self.n_rows)

    def order(self, file: int, seed: int) -> Int64[np.ndarray, " token"]:
        """Which token of the file's span, counted in corpus order, each of its rows holds."""
        start, stop = self.span(file)
        return np.random.default_rng([seed, file]).permutation(stop - start)


@dataclass(frozen=True)
class ArraySpec:
    """One array with an entry per token."""

    name: str
    """Path in the group."""
    dtype: np.dtype
    shape: tuple[int, ...]
    """Of one token."""
    chunk: int
    chunks_per_file: int
    level: int
    """Of zstd; 0 is none."""
    repetitions: bool
    """Whether zstd is worth its search for repeated strings."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return (self.chunk, *self.shape)

    def file(self, index: int) -> str:
        """Path of the index-th file, below the group."""
        return "/".join([self.name, "c", str(index), *["0"] * len(self.shape)])


def array_specs(codec: Codec, layout: Layout, places: tuple[str, ...]) -> list[ArraySpec]:
    """Every array of a shard that has an entry per token."""
    # one chunk a file: a few bytes a token
    specs = [
        ArraySpec(name, np.dtype(dtype), (), layout.file_rows, 1, _ENTROPY_LEVEL, True)
        for name, dtype in PROVENANCE.items()
    ]
    level = max(layout.compression_level, _ENTROPY_LEVEL) if codec.entropy_coded else layout.compression_level
    for place in places:
        for name, (dtype, shape) in codec.arrays().items():
            repetitions = not (codec.entropy_coded and name == codec.main_array())
            specs.append(
                ArraySpec(
                    f"{place}/{name}",
                    np.dtype(dtype),
                    shape,
                    layout.chunk,
                    layout.chunks_per_file,
                    level,
                    repetitions,
                )
            )
    return specs


def chunk_rows(codec: Codec, n_rows: int, chunk_bytes: int) -> int:
    """Tokens in a chunk: as few as make `chunk_bytes` of codes while all chunks are about equally long.

    Zarr fills the last chunk up, so a remainder would cost a whole chunk. All there are if they make less.
    """
    dtype, shape = codec.arrays()[codec.main_array()]
    least = -(-chunk_bytes // (int(np.prod(shape)) * np.dtype(dtype).itemsize))
    return -(-n_rows // max(1, n_rows // least))


def create_group(
    path: Path,
    codec: Codec,
    layout: Layout,
    channels: dict[str, Channels],
    attributes: dict,
) -> None:
    """Make the group, the metadata of its arrays and the codec's constants, replacing what is there.

    Args:
        path: Of the group.
        codec: How numbers are stored.
        layout: How rows lie in chunks and files.
        channels: The codec's constants of each place that is stored.
        attributes: Where the numbers come from; the codec's own attributes are added.
    """
    described = {
        **attributes,
        **codec.attributes(),
        "n_layers": codec.n_layers,
        "d_model": codec.d_model,
        "file_rows": layout.file_rows,
        "schema_version": SCHEMA_VERSION,
    }
    group = zarr.create_group(path, overwrite=True, zarr_format=3, attributes=described)
    for place, constants in channels.items():
        inner = group.create_group(place)
        if not codec.exact:
            for name in CONSTANTS:
                value = getattr(constants, name).numpy()
                array = _create(inner, name, value.shape, value.dtype, value.shape, None, 0)
                array[:] = value
    for spec in array_specs(codec, layout, tuple(channels)):
        whole = spec.chunk * spec.chunks_per_file
        _create(
            group,
            spec.name,
            (layout.n_rows, *spec.shape),
            spec.dtype,
            spec.chunk_shape,
            (whole, *spec.shape),
            spec.level,
        )
    make_durable(path)


def _create(
    group: Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    level: int,
) -> Array:
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=[ZstdCodec(level=level), Crc32cCodec()] if level else [Crc32cCodec()],
        fill_value=0,
        # a chunk that is all zeros is written too: an absent one is then always damage
        config={"write_empty_chunks": True},
    )


def constants_of(path: Path, place: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The codec's constants of a place.

    Raises:
        StoreError: damaged.
    """
    try:
        return {name: np.asarray(zarr.open_array(path / place / name, mode="r")[...]) for name in CONSTANTS}
    except (ValueError, TypeError, RuntimeError, OSError, LookupError) as error:
        raise StoreError(
            f"arrays {', '.join(CONSTANTS)}",
            found=f"{type(error).__name__}: {error}",
            where=path / place,
            fix="delete the shard and run it again",
        ) from error
