import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from circuitmill.errors import DivergedError, ShapeError, StoreError, UpstreamError
from circuitmill.stores.activation_schema import GROUP
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.activation_writer import Layout, ShardWriter
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.quantize import make_codec

LAYERS, WIDTH, TOKENS = 2, 32, 300
LAYOUT = Layout(chunk=16, chunks_per_file=4, calibration_tokens=50, compression_level=1)


@dataclass(frozen=True)
class _Config:
    codec: str = "int8"


def _activations() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, LAYERS, WIDTH, generator=generator)
    return inputs, 5 * torch.randn(TOKENS, LAYERS, WIDTH, generator=generator)


def _writer(folder: Path, codec: str = "int8") -> tuple[StageOutput, ShardWriter]:
    output = StageOutput("cache", _Config(codec), {}, folder, unit="train-00000")
    numbers = np.arange(TOKENS)
    provenance = {"sequence": numbers // 7, "position": numbers % 7 + 1, "token_id": numbers + 100}
    attributes = {"n_layers": LAYERS, "d_model": WIDTH, "model": "random"}
    return output, ShardWriter(output, make_codec(codec, LAYERS, WIDTH, 16), LAYOUT, provenance, attributes)


def _finish(output: StageOutput, writer: ShardWriter) -> Manifest:
    return output.finish({**writer.finish(), "split": "train"})


def _write(folder: Path, codec: str = "int8", batch: int = 37) -> Manifest:
    output, writer = _writer(folder, codec)
    for inputs, outputs in zip(*(x[writer.rows_done :].split(batch) for x in _activations()), strict=True):
        writer.append(inputs, outputs)
    return _finish(output, writer)


@pytest.mark.parametrize(("codec", "worst"), [("int8", 1e-4), ("bf16", 1e-5), ("float32", 0)])
def test_what_is_read_is_what_was_written(tmp_path: Path, codec: str, worst: float) -> None:
    shard = ActivationShard(_write(tmp_path, codec))
    for place, x in zip(("inputs", "outputs"), _activations(), strict=True):
        restored = shard.decoded(place, 13, 250)
        assert (restored - x[13:250]).square().sum() <= worst * x.square().sum()
    assert shard.provenance("sequence", 14, 17).tolist() == [2, 2, 2]
    assert shard.provenance("position", 14, 17).tolist() == [1, 2, 3]
    assert shard.provenance("token_id", 14, 17).tolist() == [114, 115, 116]


def test_schema_is_readable_with_zarr_alone(tmp_path: Path) -> None:
    _write(tmp_path)
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    assert group.attrs["codec"] == "int8"
    assert group.attrs["schema_version"] == 1
    codes, scales = group["inputs/codes"], group["inputs/scales"]
    assert (codes.shape, codes.dtype, codes.chunks, codes.shards) == (
        (TOKENS, LAYERS, WIDTH),
        np.dtype("int8"),
        (16, LAYERS, WIDTH),
        (64, LAYERS, WIDTH),
    )
    assert (scales.shape, scales.dtype) == ((TOKENS, LAYERS, 2), np.dtype("float16"))
    x = codes[:] * np.repeat(scales[:].astype("float32"), 16, axis=2) * group["inputs/channel_scale"][:]
    np.testing.assert_allclose(x, _activations()[0], atol=0.1)
    inner = codes.metadata.codecs[0].codecs
    assert [type(codec).__name__ for codec in inner] == ["BytesCodec", "ZstdCodec", "Crc32cCodec"]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "ledger.jsonl")
    }


@pytest.mark.parametrize("killed_after", [0, 50, 64, 130, 299])
def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path: Path, killed_after: int) -> None:
    straight = _write(tmp_path / "straight")
    _, writer = _writer(tmp_path / "broken")
    if killed_after:
        writer.append(*(x[:killed_after] for x in _activations()))
    # what a kill in the middle of a write leaves behind
    half = tmp_path / "broken" / GROUP / "inputs" / "codes" / "c" / "4" / "0" / "0.abc.partial"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    _, resumed = _writer(tmp_path / "broken")
    assert resumed.rows_done == killed_after // 64 * 64
    again = _write(tmp_path / "broken")
    assert again.digest == straight.digest
    assert _bytes(tmp_path / "broken") == _bytes(tmp_path / "straight")


def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = _write(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda _self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path / "broken")
    output, writer = _writer(tmp_path / "broken")
    assert _finish(output, writer).digest == straight.digest


def test_too_few_and_too_many_tokens(tmp_path: Path) -> None:
    _, writer = _writer(tmp_path / "few")
    writer.append(*(x[:100] for x in _activations()))
    with pytest.raises(ShapeError, match=r"300 tokens; found 100"):
        writer.finish()
    _, writer = _writer(tmp_path / "many")
    with pytest.raises(ShapeError, match=r"300 tokens in the shard; found 301"):
        writer.append(*(torch.cat([x, x[:1]]) for x in _activations()))


def test_not_finite_activations_are_never_written(tmp_path: Path) -> None:
    inputs, outputs = _activations()
    outputs[70, 1, 3] = float("nan")
    _, writer = _writer(tmp_path)
    with pytest.raises(DivergedError, match=r"finite MLP outputs(.|\n)*layer 1"):
        writer.append(inputs, outputs)
    assert writer.rows_done == 64


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return _write(tmp_path / "shard").folder


CODES = f"{GROUP}/inputs/codes/c/1/0/0"


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("place", [10, 800, -3, -30])
def test_a_flipped_byte_is_found_and_named(written: Path, place: int) -> None:
    manifest = load_manifest(written / "manifest.json", "cache", "train-00000")
    _flip(written / CODES, place)
    shard = ActivationShard(manifest)
    assert shard.decoded("inputs", 0, 64).shape == (64, LAYERS, WIDTH)
    with pytest.raises(StoreError) as caught:
        shard.decoded("inputs", 64, 128)
    message = str(caught.value)
    assert "chunks whose checksums match" in message
    assert f"{written / GROUP}, array inputs/codes, chunks 4 to 7" in message
    assert f"delete {written} and run the workflow again" in message


def test_every_byte_of_a_file_is_covered(written: Path) -> None:
    manifest = load_manifest(written / "manifest.json", "cache", "train-00000")
    shard = ActivationShard(manifest)
    path = written / f"{GROUP}/outputs/scales/c/0/0/0"
    whole = path.read_bytes()
    for at in range(0, len(whole), 29):
        _flip(path, at)
        with pytest.raises(StoreError, match="array outputs/scales"):
            shard.decoded("outputs", 0, 64)
        path.write_bytes(whole)
    shard.decoded("outputs", 0, 64)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [_truncate, Path.unlink])
def test_truncated_and_missing_files(written: Path, damage: Callable[[Path], None]) -> None:
    shard = ActivationShard(load_manifest(written / "manifest.json", "cache", "train-00000"))
    damage(written / CODES)
    with pytest.raises(StoreError, match=r"a file of \d+ bytes; found (\d+ bytes|no such file)(.|\n)*codes/c/1/0/0"):
        shard.decoded("inputs", 100, 101)
    with pytest.raises(UpstreamError, match=r"codes/c/1/0/0"):
        load_manifest(written / "manifest.json", "cache", "train-00000")


def test_edited_metadata(written: Path) -> None:
    manifest = load_manifest(written / "manifest.json", "cache", "train-00000")
    path = written / GROUP / "inputs" / "codes" / "zarr.json"
    path.write_text(path.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    with pytest.raises(StoreError, match=r"sha256 (.|\n)*inputs/codes/zarr\.json"):
        ActivationShard(manifest)


def test_damage_in_one_shard_leaves_a_copy_alone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copy")
    _flip(written / CODES, 10)
    copy = load_manifest(tmp_path / "copy" / "manifest.json", "cache", "train-00000")
    assert ActivationShard(copy).decoded("inputs", 64, 128).isfinite().all()
