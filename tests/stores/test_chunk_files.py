from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from circuitmill.errors import StoreError
from circuitmill.stores import chunk_files
from circuitmill.stores.chunk_files import ABSENT, ChunkEntry, ChunkFile, split_chunks, write_chunks

CHUNK, PER_FILE = 4, 3
FILE_ROWS = CHUNK * PER_FILE
FORMS = [("uint16", (2, 8)), ("int8", (2, 8)), ("uint8", (2, 4)), ("float32", (2, 8)), ("int64", ()), ("int32", ())]
"""What the codecs and the provenance store: type, shape of one token."""


def rows_of(n_rows: int, dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 30, (n_rows, *shape)).astype(dtype)


def make_array(folder: Path, n_rows: int, dtype: str, shape: tuple[int, ...], level: int) -> zarr.Array:
    """The metadata of an array of such chunks; level 0 does not compress."""
    return zarr.create_array(
        folder,
        shape=(n_rows, *shape),
        dtype=dtype,
        chunks=(CHUNK, *shape),
        shards=(FILE_ROWS, *shape),
        compressors=[ZstdCodec(level=level), Crc32cCodec()] if level else [Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def file_path(folder: Path, index: int, shape: tuple[int, ...]) -> Path:
    return folder.joinpath("c", str(index), *["0"] * len(shape))


def write(folder: Path, rows: np.ndarray, level: int, repetitions: bool = True) -> list[list[ChunkEntry]]:
    """All files of an array."""
    return [
        write_chunks(
            file_path(folder, file, rows.shape[1:]),
            list(split_chunks(rows[low : low + FILE_ROWS], CHUNK)),
            PER_FILE,
            level=level,
            repetitions=repetitions,
        )
        for file, low in enumerate(range(0, len(rows), FILE_ROWS))
    ]


def opened(path: Path, entries: list[ChunkEntry], dtype: str, shape: tuple[int, ...], level: int) -> ChunkFile:
    return ChunkFile(
        path,
        entries,
        PER_FILE,
        shape=(CHUNK, *shape),
        dtype=np.dtype(dtype),
        compressed=level > 0,
        name="inputs/codes",
        first=9,
        fix="run it again",
    )


@pytest.mark.parametrize(("level", "repetitions"), [(0, True), (1, True), (1, False), (5, True)])
@pytest.mark.parametrize(("dtype", "shape"), FORMS)
def test_zarr_reads_what_we_write(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], level: int, repetitions: bool
) -> None:
    # whole files; a file with a whole and a partial chunk; one with a partial chunk alone; one chunk
    for n_rows in (24, 30, 13, 4):
        rows = rows_of(n_rows, dtype, shape)
        make_array(tmp_path / str(n_rows), n_rows, dtype, shape, level)
        entries = write(tmp_path / str(n_rows), rows, level, repetitions)
        found = zarr.open_array(tmp_path / str(n_rows), mode="r")[...]
        assert found.dtype == dtype and np.array_equal(found, rows)
        ours = [
            opened(file_path(tmp_path / str(n_rows), file, shape), noted, dtype, shape, level).chunk(index)
            for file, noted in enumerate(entries)
            for index in range(len(noted))
        ]
        assert np.array_equal(np.concatenate(ours)[:n_rows], rows)
        assert not np.concatenate(ours)[n_rows:].any()


def entries_in(path: Path) -> list[ChunkEntry]:
    """What a file of Zarr's says of its chunks, and their checksums."""
    content = path.read_bytes()
    index = np.frombuffer(content[-(16 * PER_FILE + 4) : -4], dtype="<u8").reshape(-1, 2)
    return [
        ChunkEntry(offset, size, int.from_bytes(content[offset + size - 4 : offset + size], "little"))
        for offset, size in index.tolist()
        if offset != ABSENT
    ]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(("dtype", "shape"), FORMS)
def test_we_read_what_zarr_writes(tmp_path: Path, dtype: str, shape: tuple[int, ...], level: int) -> None:
    rows = rows_of(30, dtype, shape)
    make_array(tmp_path / "zarr", 30, dtype, shape, level)[...] = rows
    write(tmp_path / "ours", rows, level)
    for file in range(3):
        path = file_path(tmp_path / "zarr", file, shape)
        read = opened(path, entries_in(path), dtype, shape, level)
        for index in range(len(entries_in(path))):
            low = file * FILE_ROWS + index * CHUNK
            expected = next(split_chunks(rows[low : low + CHUNK], CHUNK), None)
            # Zarr fills a file up with chunks of nothing, we leave those out
            assert np.array_equal(read.chunk(index), np.zeros_like(rows[:CHUNK]) if expected is None else expected)
        if level == 0 and file < 2:
            assert path.read_bytes() == file_path(tmp_path / "ours", file, shape).read_bytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([(), (3,), (2, 5)]))
def test_chunks_are_the_rows_filled_up_with_zeros(n_rows: int, chunk: int, shape: tuple[int, ...]) -> None:
    rows = rows_of(n_rows, "int32", shape)
    parts = list(split_chunks(rows, chunk))
    assert len(parts) == -(-n_rows // chunk) and {len(part) for part in parts} == {chunk}
    assert np.array_equal(np.concatenate(parts)[:n_rows], rows) and not np.concatenate(parts)[n_rows:].any()


def test_words_alone_are_no_larger_than_with_a_search_for_repetitions(tmp_path: Path) -> None:
    """Codes of a normal number at about four bits, in chunks of a size that is used."""
    codes = np.random.default_rng(0).normal(0, 4, (256, 4, 128)).round().astype(np.int8)
    sizes = [
        write_chunks(tmp_path / str(search), [codes], 1, level=1, repetitions=search)[0].size
        for search in (False, True)
    ]
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(shares * np.log2(shares)).sum() * codes.size / 8
    assert sizes[0] <= sizes[1]
    assert entropy < sizes[0] < 1.02 * entropy


LEVELS = pytest.mark.parametrize("level", [0, 1])


@pytest.fixture
def made(tmp_path: Path) -> Callable[[int], tuple[Path, list[ChunkEntry]]]:
    """A file of three chunks, the last of them partial, and one of two."""

    def make(level: int, file: int = 0) -> tuple[Path, list[ChunkEntry]]:
        entries = write(tmp_path, rows_of(20, "int8", (2, 8)), level)
        return file_path(tmp_path, file, (2, 8)), entries[file]

    return make


def read_all(path: Path, entries: list[ChunkEntry], level: int) -> None:
    file = opened(path, entries, "int8", (2, 8), level)
    for index in range(len(entries)):
        file.chunk(index)


@LEVELS
@pytest.mark.parametrize("file", [0, 1])
def test_every_flipped_bit_is_found(made: Callable, level: int, file: int) -> None:
    path, entries = made(level, file)
    whole = path.read_bytes()
    read_all(path, entries, level)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"array inputs/codes, chunk \d+\n"):
            read_all(path, entries, level)


@LEVELS
def test_every_truncation_is_found(made: Callable, level: int) -> None:
    path, entries = made(level)
    whole = path.read_bytes()
    ends = {entry.offset + part for entry in entries for part in (0, entry.size - 4, entry.size)}
    for length in sorted(ends | {1, len(whole) - 4, len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=rf"a file of {len(whole)} bytes; found {length} bytes"):
            read_all(path, entries, level)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreError, match=rf"found {len(whole) + 1} bytes"):
        read_all(path, entries, level)
    path.unlink()
    with pytest.raises(StoreError, match=r"no such file(.|\n)*run it again"):
        read_all(path, entries, level)


def test_a_damaged_chunk_is_named_and_leaves_the_others(made: Callable) -> None:
    path, entries = made(0)
    content = bytearray(path.read_bytes())
    content[entries[1].offset + 3] ^= 1
    path.write_bytes(content)
    file = opened(path, entries, "int8", (2, 8), 0)
    file.chunk(0), file.chunk(2)
    with pytest.raises(StoreError) as caught:
        file.chunk(1)
    assert f"where: {path}, array inputs/codes, chunk 10" in str(caught.value)
    assert f"crc32c {entries[1].crc32c:08x}" in str(caught.value)


def test_damage_while_the_file_is_open_is_found(made: Callable) -> None:
    path, entries = made(0)
    file = opened(path, entries, "int8", (2, 8), 0)
    before = file.chunk(0).copy()
    with path.open("r+b") as other:
        other.seek(entries[0].offset)
        other.write(b"\xff\xff\xff")
    with pytest.raises(StoreError):
        file.chunk(0)
    assert not np.array_equal(before, np.zeros_like(before))


def test_chunks_that_were_exchanged_are_found_here_and_not_by_zarr(made: Callable, tmp_path: Path) -> None:
    make_array(tmp_path, 20, "int8", (2, 8), 0)
    path, entries = made(0)
    content = path.read_bytes()
    size = entries[0].size
    assert size == entries[1].size
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    rows = rows_of(20, "int8", (2, 8))
    # every chunk has its own right checksum, so Zarr returns rows in places where they never were
    found = zarr.open_array(tmp_path, mode="r")[...]
    assert np.array_equal(found[:CHUNK], rows[CHUNK : 2 * CHUNK]) and not np.array_equal(found, rows)
    file = opened(path, entries, "int8", (2, 8), 0)
    for index in (0, 1):
        with pytest.raises(StoreError, match=rf"chunk {9 + index}\n"):
            file.chunk(index)


def test_files_that_were_exchanged_are_found(tmp_path: Path) -> None:
    entries = write(tmp_path, rows_of(24, "int8", (2, 8)), 0)
    one, two = (file_path(tmp_path, file, (2, 8)) for file in (0, 1))
    contents = one.read_bytes(), two.read_bytes()
    assert len(contents[0]) == len(contents[1])
    one.write_bytes(contents[1]), two.write_bytes(contents[0])
    for path, noted in ((one, entries[0]), (two, entries[1])):
        file = opened(path, noted, "int8", (2, 8), 0)
        for index in range(PER_FILE):
            with pytest.raises(StoreError, match="crc32c"):
                file.chunk(index)


def test_an_index_that_points_elsewhere_is_found(made: Callable) -> None:
    """With its own checksum made right, so that Zarr would follow it."""
    path, entries = made(0)
    content = path.read_bytes()
    at = entries[-1].offset + entries[-1].size
    pairs = np.frombuffer(content[at:-4], dtype="<u8").reshape(-1, 2)[[1, 0, 2]].tobytes()
    path.write_bytes(content[:at] + pairs + google_crc32c.value(pairs).to_bytes(4, "little"))
    with pytest.raises(StoreError, match="the index that was written; found another one"):
        opened(path, entries, "int8", (2, 8), 0)


@LEVELS
def test_the_chunk_list_of_another_file_is_refused(made: Callable, tmp_path: Path, level: int) -> None:
    path, entries = made(level)
    others = write(tmp_path / "other", rows_of(20, "int8", (2, 8), seed=1), level)[0]
    with pytest.raises(StoreError):
        read_all(path, others, level)
    with pytest.raises(StoreError, match="a file of"):
        read_all(path, entries[:2], level)


@pytest.mark.parametrize("level", [0, 1])
def test_a_chunk_of_another_length_is_refused(tmp_path: Path, level: int) -> None:
    """Checksums right throughout: written for another shape."""
    chunks = [np.zeros((CHUNK + 1, 2, 8), np.int8) + 5]
    entries = write_chunks(tmp_path / "x", chunks, PER_FILE, level=level)
    with pytest.raises(StoreError, match=r"a chunk of 64 bytes; found 80|a zstd frame"):
        opened(tmp_path / "x", entries, "int8", (2, 8), level).chunk(0)


def test_bytes_that_are_no_frame_are_refused(tmp_path: Path) -> None:
    entries = write_chunks(tmp_path / "x", [np.ones((CHUNK, 2, 8), np.int8)], PER_FILE, level=0)
    with pytest.raises(StoreError, match="a zstd frame"):
        opened(tmp_path / "x", entries, "int8", (2, 8), 1).chunk(0)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c" / "0"
    chunks = list(split_chunks(rows_of(12, "int8", (2, 8)), CHUNK))

    def fails(_descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(chunk_files.os, "fsync", fails)
        write_chunks(path, chunks, PER_FILE, level=0)
    # what is left has a name that no reader asks for and that StageOutput removes
    assert [left.name for left in path.parent.iterdir()] == [".0.tmp"]
    entries = write_chunks(path, chunks, PER_FILE, level=0)
    assert [left.name for left in path.parent.iterdir()] == ["0"]
    read_all(path, entries, 0)
    # an old file stays as it is until the new one is complete
    old = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(chunk_files.os, "fsync", fails)
        write_chunks(path, chunks[:1], PER_FILE, level=0)
    assert path.read_bytes() == old
