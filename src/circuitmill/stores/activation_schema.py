"""The layout of a shard of activations: one Zarr v3 group, written once, checked on every read.

    activations.zarr/
      sequence   int64 [token]           sequence of the token store
      position   int32 [token]           position in it
      token_id   int32 [token]
      inputs/    arrays of the codec, [token ...]; channel_scale [layer d_model] for int8
      outputs/   the same

Every array is split into files of `chunks_per_file` chunks (Zarr's sharding codec). Each chunk is compressed by
zstd and carries a crc32c; so does the index of each file.
"""

from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.array import Array
from zarr.core.group import Group

from circuitmill.errors import StoreError
from circuitmill.stores.quantize import Codec

SCHEMA_VERSION = 1
GROUP = "activations.zarr"
PLACES = ("inputs", "outputs")
PROVENANCE = {"sequence": "int64", "position": "int32", "token_id": "int32"}
_PROVENANCE_CHUNK = 2**18
"""Tokens in a chunk of the provenance arrays: 1 MB of int32."""


def chunk_rows(codec: Codec, n_rows: int, chunk_bytes: int) -> int:
    """Tokens in a chunk: the least power of two that makes `chunk_bytes` of codes, or all there are if fewer."""
    dtype, shape = codec.arrays()[codec.main_array()]
    one = int(np.prod(shape)) * np.dtype(dtype).itemsize
    rows = 1
    while rows * one < chunk_bytes:
        rows *= 2
    return min(rows, n_rows)


def _create(group: Group, name: str, shape: tuple[int, ...], dtype: str, chunk: int, shard: int, level: int) -> None:
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        compressors=[ZstdCodec(level=level), Crc32cCodec()],
        fill_value=0,
        # a chunk that is all zeros is written too: an absent one is then always damage
        config={"write_empty_chunks": True},
    )


def create_group(
    path: Path, codec: Codec, n_rows: int, *, chunk: int, chunks_per_file: int, level: int, attributes: dict
) -> Group:
    """Make the group and its empty arrays, replacing what is there.

    Args:
        chunk: Tokens in a chunk of codes.
        level: Of zstd.
        attributes: Where the numbers come from; the codec's own attributes are added.
    """
    described = {**attributes, **codec.attributes(), "schema_version": SCHEMA_VERSION}
    group = zarr.create_group(path, overwrite=True, zarr_format=3, attributes=described)
    own = min(_PROVENANCE_CHUNK, n_rows)
    for name, dtype in PROVENANCE.items():
        _create(group, name, (n_rows,), dtype, own, -(-n_rows // own) * own, level)
    for place in PLACES:
        inner = group.create_group(place)
        for name, (dtype, shape) in codec.arrays().items():
            _create(inner, name, (n_rows, *shape), dtype, chunk, chunk * chunks_per_file, level)
        if codec.name == "int8":
            whole = (codec.n_layers, codec.d_model)
            _create(inner, "channel_scale", whole, "float32", whole[0], whole[0], level)
    return group


def file_of(index: int, axes: int) -> str:
    """Path, inside an array's folder, of the file that holds the index-th run of chunks."""
    return "/".join(["c", str(index), *["0"] * (axes - 1)])


def array_of(group: Group, name: str) -> Array:
    """An array of a shard.

    Raises:
        StoreError: there is a group of that name instead.
    """
    array = group[name]
    if not isinstance(array, Array):
        raise StoreError(
            f"an array {name}", found=type(array).__name__, where=group.store_path, fix="delete the shard and rerun it"
        )
    return array
