"""Reading one shard of activations, with nothing believed that has not been checked.

On opening, metadata and the list of chunks are compared with the manifest's checksums. Each file of chunks must have
the size and the index that were written, and each chunk the crc32c that was noted for its place.
"""

import json
from bisect import bisect_right

import numpy as np
import torch
from jaxtyping import Int

from circuitmill.core.codecs import Channels, Codec
from circuitmill.errors import StoreError
from circuitmill.stores.activation_schema import (
    CHUNKS,
    CONSTANTS,
    GROUP,
    PLACES,
    PROVENANCE,
    SCHEMA_VERSION,
    ArraySpec,
    Layout,
    array_specs,
    constants_of,
)
from circuitmill.stores.chunk_files import ChunkEntry, ChunkFile
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.rows import Rows


class ActivationShard:
    """One shard: codes, scales and provenance of a run of tokens, in files inside which they are shuffled."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._path = manifest, manifest.folder / GROUP
        self.name, self.n_tokens = manifest.unit, int(manifest.counts["tokens"])
        for relative in manifest.files:
            # the codec's constants are small arrays, read once
            if relative.endswith("zarr.json") or (relative.split("/")[2:3] and relative.split("/")[2] in CONSTANTS):
                manifest.checked_file(relative)
        noted = json.loads(manifest.checked_file(CHUNKS).read_text())
        self.attributes: dict = self._read_attributes()
        self.codec = Codec(
            self.attributes["codec"],
            int(self.attributes["n_layers"]),
            int(self.attributes["d_model"]),
            int(self.attributes.get("group_channels", 0)),
        )
        self.places = tuple(place for place in PLACES if f"{place}/{self.codec.main_array()}" in noted)
        self._layout = self._read_layout()
        self._specs = {spec.name: spec for spec in array_specs(self.codec, self._layout, self.places)}
        self._entries = {
            name: [[ChunkEntry(*entry) for entry in file] for file in files] for name, files in noted.items()
        }
        self._files: dict[tuple[str, int], ChunkFile] = {}
        self.channels = {place: self._read_channels(place) for place in self.places}

    def _read_attributes(self) -> dict:
        attributes = json.loads((self._path / "zarr.json").read_text())["attributes"]
        if attributes["schema_version"] != SCHEMA_VERSION:
            raise StoreError(
                f"activations of schema version {SCHEMA_VERSION}",
                found=attributes["schema_version"],
                where=self._path,
                fix="rerun stage cache with this version of circuitmill",
            )
        return attributes

    def _read_layout(self) -> Layout:
        name = f"inputs/{self.codec.main_array()}"
        metadata = json.loads((self._path / name / "zarr.json").read_text())
        outer = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        sharding = metadata["codecs"][0]["configuration"]
        chunk = sharding["chunk_shape"][0]
        level = next((codec["configuration"]["level"] for codec in sharding["codecs"] if codec["name"] == "zstd"), 0)
        return Layout(self.n_tokens, chunk, outer // chunk, level)

    def _read_channels(self, place: str) -> Channels:
        if self.codec.exact:
            return Channels.neutral(self.codec.n_layers, self.codec.d_model)
        return Channels(**{name: torch.from_numpy(value) for name, value in constants_of(self._path, place).items()})

    @property
    def chunk(self) -> int:
        """Tokens in a chunk."""
        return self._layout.chunk

    @property
    def file_rows(self) -> int:
        """Tokens in a file."""
        return self._layout.file_rows

    def _fix(self) -> str:
        return (
            f"delete {self._manifest.folder} and run the workflow again: only shard {self.name} and what follows "
            "is made anew"
        )

    def _file(self, spec: ArraySpec, index: int) -> ChunkFile:
        key = (spec.name, index)
        if key not in self._files:
            self._files[key] = ChunkFile(
                self._path / spec.file(index),
                self._entries[spec.name][index],
                spec.chunks_per_file,
                shape=spec.chunk_shape,
                dtype=spec.dtype,
                compressed=spec.level > 0,
                name=spec.name,
                first=index * spec.chunks_per_file,
                fix=self._fix(),
            )
        return self._files[key]

    def read_chunk(self, index: int, places: tuple[str, ...] | None = None) -> Rows:
        """Stored numbers of one chunk of tokens, in stored order.

        Args:
            index: Chunk `index` holds rows `index * chunk` on.
            places: Those that are wanted; all that are stored if None.

        Raises:
            StoreError: damaged.
        """
        rows = min(self.chunk, self.n_tokens - index * self.chunk)
        file, within = divmod(index, self._layout.chunks_per_file)
        return {
            (place, name): self._file(self._specs[f"{place}/{name}"], file).chunk(within)[:rows]
            for place in places or self.places
            for name in self.codec.arrays()
        }

    def provenance(self, file: int) -> dict[str, Int[np.ndarray, " token"]]:
        """Sequence, position and token id of the rows of one file, in stored order.

        Raises:
            StoreError: damaged.
        """
        start, stop = self._layout.span(file)
        return {name: self._file(self._specs[name], file).chunk(0)[: stop - start] for name in PROVENANCE}

    def read_file(self, file: int, places: tuple[str, ...]) -> tuple[Rows, dict[str, Int[np.ndarray, " token"]]]:
        """Stored numbers and provenance of the rows of one file, in corpus order.

        Raises:
            StoreError: damaged.
        """
        where = self.provenance(file)
        order = np.lexsort((where["position"], where["sequence"]))
        start, stop = self._layout.span(file)
        chunks = [self.read_chunk(index, places) for index in range(start // self.chunk, -(-stop // self.chunk))]
        rows = {key: np.concatenate([chunk[key] for chunk in chunks])[order] for key in chunks[0]}
        return rows, {name: values[order] for name, values in where.items()}

    @property
    def n_files(self) -> int:
        """Files of each array."""
        return self._layout.n_files


class ShardBlocks:
    """The chunks of several shards as blocks to draw batches from; see `stores.batches`.

    Args:
        shards: Of one codec and one calibration, in a fixed order.
    """

    def __init__(self, shards: list[ActivationShard]) -> None:
        self._shards = shards
        self.codec, self.channels = shards[0].codec, shards[0].channels
        sizes, strata, self._starts = [], [], [0]
        for shard in shards:
            rows = np.arange(0, shard.n_tokens, shard.chunk)
            sizes.append(np.minimum(shard.chunk, shard.n_tokens - rows))
            first = strata[-1][-1] + 1 if strata else 0
            strata.append(first + rows // shard.file_rows)
            self._starts.append(self._starts[-1] + len(rows))
        self.sizes: Int[np.ndarray, " block"] = np.concatenate(sizes)
        self.strata: Int[np.ndarray, " block"] = np.concatenate(strata)

    def read(self, block: int) -> Rows:
        """Stored numbers of one block.

        Raises:
            StoreError: damaged.
        """
        shard = bisect_right(self._starts, block) - 1
        return self._shards[shard].read_chunk(block - self._starts[shard])
