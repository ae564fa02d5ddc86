"""Files of Zarr's sharding codec: chunks one after the other, each with its crc32c, then an index with its own.

The layout is that of Zarr v3 (sharding_indexed, index at the end; inner codecs bytes, optionally zstd, crc32c), so any
Zarr reader opens it. We write and read it ourselves for three reasons: a chunk is bound to its place, because its
checksum is compared with the one noted when it was written (Zarr accepts two chunks that were exchanged); entropy
coding without the search for repetitions, which quantised codes do not have, is faster and no larger; and chunks go
straight to where they are needed (`benchmarks/cache_read.py` compares the rates).
"""

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path

import google_crc32c
import numpy as np
import zstandard
from jaxtyping import Shaped

from circuitmill.errors import StoreError
from circuitmill.stores.files import sync_folder

ABSENT = 2**64 - 1
"""Offset and length of a chunk that a file does not hold."""
_CRC_BYTES = 4
_FASTEST = 1
_LARGEST_CHUNK = 2**31
"""A chunk that claims to be longer than this once decompressed is damaged."""
_local = threading.local()


@dataclass(frozen=True)
class ChunkEntry:
    """Where a chunk lies in its file, and the checksum it was written with."""

    offset: int
    size: int
    """Bytes, with the crc32c at the end."""
    crc32c: int


def _compressor(level: int, repetitions: bool) -> zstandard.ZstdCompressor:
    """A thread's own compressor.

    Args:
        repetitions: Search for repeated strings; without, all that zstd does is to give frequent bytes short words.
    """
    known = _local.__dict__.setdefault("compressors", {})
    key = (level, repetitions)
    if key not in known:
        # a hash table of 64 entries and matches of at least 7 bytes: none are found, and the search skips ahead
        only_words = zstandard.ZstdCompressionParameters(
            compression_level=_FASTEST,
            window_log=20,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
            write_content_size=1,
        )
        known[key] = (
            zstandard.ZstdCompressor(level=level)
            if repetitions
            else zstandard.ZstdCompressor(compression_params=only_words)
        )
    return known[key]


def write_chunks(
    path: Path, chunks: Sequence[Shaped[np.ndarray, "..."]], per_file: int, *, level: int, repetitions: bool = True
) -> list[ChunkEntry]:
    """Write a file whole and durable, or not at all.

    Args:
        chunks: Contents, in order; contiguous arrays of equal shape.
        per_file: Chunks that a full file has; those beyond `chunks` are marked absent.
        level: Of zstd; 0 does not compress.
        repetitions: As for `_compressor`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    entries: list[ChunkEntry] = []
    with temporary.open("wb") as file:
        at = 0
        for chunk in chunks:
            # what is not compressed goes into the file from where it lies
            body = _compressor(level, repetitions).compress(chunk.data) if level else chunk.reshape(-1).view(np.uint8)
            crc = google_crc32c.value(body)
            file.write(body if isinstance(body, bytes) else body.data)
            file.write(struct.pack("<I", crc))
            entries.append(ChunkEntry(at, len(body) + _CRC_BYTES, crc))
            at += len(body) + _CRC_BYTES
        file.write(_index(entries, per_file))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return entries


def _index(entries: Sequence[ChunkEntry], per_file: int) -> bytes:
    pairs = [(entry.offset, entry.size) for entry in entries] + [(ABSENT, ABSENT)] * (per_file - len(entries))
    body = np.array(pairs, dtype="<u8").tobytes()
    return body + struct.pack("<I", google_crc32c.value(body))


class ChunkFile:
    """A file of chunks, open for reading. Every read is checked; safe to use from several threads.

    Args:
        path: The file.
        entries: What `write_chunks` returned.
        per_file: Chunks that a full file has.
        shape: Of a chunk.
        dtype: Of a number.
        compressed: Whether zstd was used.
        name: What to call the array in messages.
        first: Number of the file's first chunk in the array.
        fix: What to do about damage.

    Raises:
        StoreError: missing, of another size, or its index is not the one that was written.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[ChunkEntry],
        per_file: int,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype,
        compressed: bool,
        name: str,
        first: int,
        fix: str,
    ) -> None:
        self._path, self._entries, self._name, self._first, self._fix = path, entries, name, first, fix
        self._shape, self._dtype, self._compressed = shape, dtype, compressed
        self._chunk_bytes = int(np.prod(shape)) * dtype.itemsize
        index = _index(entries, per_file)
        end = entries[-1].offset + entries[-1].size
        descriptor = self._open(0)
        try:
            size, found = os.fstat(descriptor).st_size, os.pread(descriptor, len(index), end)
        finally:
            os.close(descriptor)
        if size != end + len(index):
            raise self._damaged(0, f"a file of {end + len(index)} bytes", f"{size} bytes")
        if found != index:
            raise self._damaged(0, "the index that was written", "another one")

    def _open(self, index: int) -> int:
        """A descriptor of the file; not kept, because a cache has more files than a process may hold open."""
        try:
            return os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise self._damaged(
                index, "a file that can be read", "no such file" if error.errno == ENOENT else str(error)
            ) from error

    def chunk(self, index: int) -> Shaped[np.ndarray, "token ..."]:
        """One chunk, read-only.

        Args:
            index: Number in this file.

        Raises:
            StoreError: its bytes are not those that were written.
        """
        entry = self._entries[index]
        length = entry.size - _CRC_BYTES
        descriptor = self._open(index)
        try:
            body = os.pread(descriptor, length, entry.offset)
            tail = os.pread(descriptor, _CRC_BYTES, entry.offset + length)
        finally:
            os.close(descriptor)
        found = google_crc32c.value(body)
        if found != entry.crc32c or tail != struct.pack("<I", entry.crc32c):
            raise self._damaged(
                index, f"crc32c {entry.crc32c:08x}", f"{found:08x} over {len(body)} bytes, followed by {tail.hex()}"
            )
        if self._compressed:
            body = self._decompress(index, body)
        if len(body) != self._chunk_bytes:
            raise self._damaged(index, f"a chunk of {self._chunk_bytes} bytes", f"{len(body)}")
        return np.frombuffer(body, dtype=self._dtype).reshape(self._shape)

    def _decompress(self, index: int, body: bytes) -> bytes:
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        try:
            return _local.decompressor.decompress(body, max_output_size=min(self._chunk_bytes, _LARGEST_CHUNK))
        except zstandard.ZstdError as error:
            raise self._damaged(index, "a zstd frame", str(error)) from error

    def _damaged(self, index: int, expected: str, found: str) -> StoreError:
        where = f"{self._path}, array {self._name}, chunk {self._first + index}"
        return StoreError(expected, found=found, where=where, fix=self._fix)


def split_chunks(rows: Shaped[np.ndarray, "token ..."], chunk: int) -> Iterator[Shaped[np.ndarray, "token ..."]]:
    """Rows in chunks of equal length; the last is filled up with zeros, as Zarr's regular grid asks."""
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        if len(part) < chunk:
            part = np.concatenate([part, np.zeros((chunk - len(part), *rows.shape[1:]), dtype=rows.dtype)])
        yield part
