"""Nothing that was damaged after it was written is ever read as if it were good."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from tests.stores.small_store import LAYERS, TOKENS, WIDTH, Config, activations, flip, reopen, write_shard

from circuitmill.errors import StoreError, UpstreamError
from circuitmill.stores.activation_schema import CHUNKS, GROUP, Layout
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.manifest import NAME, load_manifest

CODES = f"{GROUP}/inputs/codes/c/1/0/0"
CHUNK_BYTES = 16 * LAYERS * WIDTH + 4


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "shard", Config()).folder


def read_everything(shard: ActivationShard) -> None:
    for file in range(shard.n_files):
        shard.read_file(file, shard.places)


@pytest.mark.parametrize("place", [10, CHUNK_BYTES + 700, -3, -30])
def test_a_flipped_bit_is_found_and_named(written: Path, place: int) -> None:
    flip(written / CODES, place)
    shard = reopen(written)
    rows, _ = shard.read_file(0, ("inputs", "outputs"))
    assert rows["inputs", "codes"].shape == (64, LAYERS, WIDTH)
    with pytest.raises(StoreError) as caught:
        shard.read_file(1, ("inputs",))
    chunk = {10: 4, CHUNK_BYTES + 700: 5}.get(place, 4)
    assert f"where: {written / CODES}, array inputs/codes, chunk {chunk}\n" in str(caught.value)
    assert f"delete {written} and run the workflow again: only shard train-00000" in str(caught.value)
    shard.read_file(1, ("outputs",))


@pytest.mark.parametrize("codec", ["bf16", "int4", "entropy"])
def test_every_part_of_every_file_is_covered(tmp_path: Path, codec: str) -> None:
    """Metadata, constants, chunk lists, codes, scales and provenance: in each file, places with a stride."""
    folder = write_shard(tmp_path, Config(codec)).folder
    manifest = load_manifest(folder / NAME, "cache", "train-00000")
    read_everything(ActivationShard(manifest))
    paths = [path for path in (folder / GROUP).rglob("*") if path.is_file()] + [folder / CHUNKS]
    for path in paths:
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 6, len(whole) - 1}:
            flip(path, at)
            with pytest.raises(StoreError):
                read_everything(ActivationShard(manifest))
            path.write_bytes(whole)
    read_everything(ActivationShard(manifest))


def test_damage_in_provenance_is_found(written: Path) -> None:
    flip(written / GROUP / "position" / "c" / "2", 20)
    shard = reopen(written)
    shard.read_chunk(8)
    with pytest.raises(StoreError, match="array position, chunk 2"):
        shard.read_file(2, ("inputs",))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_truncated_and_missing_files_are_named(written: Path, damage: Callable[[Path], None]) -> None:
    shard = reopen(written)
    damage(written / CODES)
    with pytest.raises(
        StoreError, match=r"a file (of \d+ bytes|that can be read); found (\d+ bytes|no such file)(.|\n)*codes/c/1/0/0"
    ):
        shard.read_chunk(5)
    with pytest.raises(UpstreamError, match=r"codes/c/1/0/0"):
        reopen(written)


@pytest.mark.parametrize(
    "name", ["zarr.json", "inputs/codes/zarr.json", "inputs/center/c/0/0", "outputs/scale/zarr.json", "inputs/step/c/0"]
)
def test_damaged_metadata_and_constants_are_refused_on_opening(written: Path, name: str) -> None:
    manifest = load_manifest(written / NAME, "cache", "train-00000")
    flip(written / GROUP / name, 30 if name.endswith("json") else 3)
    with pytest.raises(StoreError, match=rf"sha256 (.|\n)*{name}"):
        ActivationShard(manifest)


def test_a_chunk_list_that_was_edited_is_refused(written: Path) -> None:
    manifest = load_manifest(written / NAME, "cache", "train-00000")
    noted = json.loads((written / CHUNKS).read_text())
    noted["inputs/codes"][0], noted["inputs/codes"][1] = noted["inputs/codes"][1], noted["inputs/codes"][0]
    (written / CHUNKS).write_text(json.dumps(noted))
    with pytest.raises(StoreError, match=r"sha256 (.|\n)*chunks\.json"):
        ActivationShard(manifest)


def exchange(one: Path, two: Path) -> None:
    contents = one.read_bytes(), two.read_bytes()
    assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
    one.write_bytes(contents[1]), two.write_bytes(contents[0])


@pytest.mark.parametrize(
    ("one", "two"),
    [("inputs/codes/c/0/0/0", "inputs/codes/c/1/0/0"), ("inputs/codes/c/2/0/0", "outputs/codes/c/2/0/0"),
     ("inputs/scales/c/0/0/0", "inputs/scales/c/3/0/0"), ("outputs/codes/c/4/0/0", "inputs/codes/c/4/0/0")],
)  # fmt: skip
def test_files_that_were_exchanged_are_found_here_and_not_by_zarr(written: Path, one: str, two: str) -> None:
    before = zarr.open_group(written / GROUP, mode="r")["inputs"]
    good = {name: before[name][:] for name in ("codes", "scales")}
    exchange(written / GROUP / one, written / GROUP / two)
    after = zarr.open_group(written / GROUP, mode="r")["inputs"]
    assert any(not np.array_equal(after[name][:], good[name]) for name in good), "Zarr reads other numbers, and gladly"
    with pytest.raises(StoreError, match="crc32c"):
        read_everything(reopen(written))


def test_chunks_that_were_exchanged_inside_a_file_are_found(written: Path) -> None:
    content = (written / CODES).read_bytes()
    parts = [content[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES] for n in range(4)]
    (written / CODES).write_bytes(b"".join([parts[0], parts[3], parts[2], parts[1]]) + content[4 * CHUNK_BYTES :])
    assert zarr.open_group(written / GROUP, mode="r")["inputs/codes"][:].shape == (TOKENS, LAYERS, WIDTH)
    shard = reopen(written)
    shard.read_chunk(4), shard.read_chunk(6)
    for chunk in (5, 7):
        with pytest.raises(StoreError, match=rf"array inputs/codes, chunk {chunk}\n"):
            shard.read_chunk(chunk)


def test_a_file_of_another_shard_is_found(written: Path, tmp_path: Path) -> None:
    other = write_shard(tmp_path / "other", Config(layout=Layout(TOKENS, 16, 4, 1))).folder
    same = write_shard(tmp_path / "same", Config(), tuple(reversed(activations()))).folder
    for folder in (other, same):
        copy = shutil.copytree(written, tmp_path / f"copy-{folder.name}")
        shutil.copy(folder / CODES, copy / CODES)
        with pytest.raises((StoreError, UpstreamError)):
            read_everything(reopen(copy))


def test_damage_in_one_shard_leaves_a_copy_alone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copy")
    flip(written / CODES, 10)
    read_everything(reopen(tmp_path / "copy"))
