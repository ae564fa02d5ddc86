from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from tests.stores.small_store import (
    ALL_CODECS,
    LAYERS,
    LAYOUT,
    TOKENS,
    WIDTH,
    Config,
    activations,
    open_store,
    reopen,
    write_shard,
    write_shards,
)

from circuitmill.core.codecs import make_codec
from circuitmill.errors import StoreError
from circuitmill.stores.activation_schema import GROUP, Layout, chunk_rows
from circuitmill.stores.activations import ActivationStore

SIZES = (300, 130, 64, 7)
WORST = {"float32": 0, "bf16": 1e-5, "int8": 1e-4, "int4": 1e-2, "int2": 0.15, "entropy": 8e-3}


def parts() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [activations(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Exact numbers in four shards of files of 64 tokens; the last two have one file each."""
    folder = tmp_path_factory.mktemp("store")
    return open_store(folder, write_shards(folder, Config("float32"), parts()))


@pytest.fixture(scope="module")
def originals() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, outputs = zip(*parts(), strict=True)
    return torch.cat(inputs), torch.cat(outputs)


RANGES = [(0, 501), (0, 1), (500, 501), (63, 65), (250, 320), (13, 250), (299, 301), (300, 430), (429, 501), (64, 128)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_reading_in_corpus_order_gives_the_originals(
    store: ActivationStore, originals: tuple[torch.Tensor, torch.Tensor], start: int, stop: int
) -> None:
    rows = store.read("train", start, stop)
    assert store.n_tokens("train") == 501
    assert torch.equal(rows.inputs, originals[0][start:stop])
    assert torch.equal(rows.outputs, originals[1][start:stop])
    within = np.concatenate([np.arange(size) for size in SIZES])[start:stop]
    assert np.array_equal(rows.sequence, within // 7)
    assert np.array_equal(rows.position, within % 7 + 1)
    assert np.array_equal(rows.token_id, within + 100)


def test_rows_on_disk_are_in_another_order(store: ActivationStore) -> None:
    ids = store.shards("train")[0].provenance(0)["token_id"]
    assert sorted(ids) == list(range(100, 164)) and list(ids) != sorted(ids)


def test_reading_again_and_backwards_gives_the_same(store: ActivationStore) -> None:
    whole = store.read("train", 0, 501)
    for start in (400, 380, 10, 64, 0, 63):
        assert torch.equal(store.read("train", start, start + 20).inputs, whole.inputs[start : start + 20])


def test_outputs_can_be_left_out(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store.read("train", 40, 90)
    asked = []
    shard = type(store.shards("train")[0])
    read = shard.read_chunk
    monkeypatch.setattr(shard, "read_chunk", lambda self, n, places: asked.append(places) or read(self, n, places))
    rows = store.read("train", 40, 90, outputs=False)
    assert rows.outputs is None and torch.equal(rows.inputs, whole.inputs)
    assert set(asked) == {("inputs",)}
    # the file in memory now has no outputs, and is read again for them
    assert torch.equal(store.read("train", 70, 80).outputs, whole.outputs[30:40])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 502), (5, 5), (6, 5), (501, 502)])
def test_reading_outside_the_split_is_refused(store: ActivationStore, start: int, stop: int) -> None:
    with pytest.raises(StoreError, match=rf"tokens within 0 to 501; found {start} to {stop}(.|\n)*split train"):
        store.read("train", start, stop)


def test_inputs_alone_are_read_and_outputs_refused(
    tmp_path: Path, originals: tuple[torch.Tensor, torch.Tensor]
) -> None:
    store = open_store(tmp_path, write_shards(tmp_path, Config("float32", ("inputs",)), parts()))
    assert torch.equal(store.read("train", 250, 440, outputs=False).inputs, originals[0][250:440])
    with pytest.raises(StoreError, match=r"stored outputs; found a cache of inputs alone(.|\n)*cache\.targets=stored"):
        store.read("train", 0, 10)
    mean = originals[1].double().mean(dim=0)
    torch.testing.assert_close(store.normalization.output_mean.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_every_codec_gives_back_what_it_can(tmp_path: Path, codec: str) -> None:
    store = open_store(tmp_path, write_shards(tmp_path, Config(codec), parts()[:2]))
    rows = store.read("train", 33, 420)
    for found, expected in zip((rows.inputs, rows.outputs), zip(*parts()[:2], strict=True), strict=True):
        x = torch.cat(expected)[33:420]
        error = (found - x).square().sum()
        # a shift of three costs nothing: errors are relative to the deviation
        assert error <= WORST[codec] * (x - x.mean(dim=0)).square().sum()


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_a_store_can_be_read_with_zarr_alone(tmp_path: Path, codec: str) -> None:
    """With what docs/formats.md says, numpy and no code of ours."""
    write_shard(tmp_path, Config(codec))
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    attributes = dict(group.attrs)
    assert (attributes["codec"], attributes["schema_version"], attributes["model"]) == (codec, 2, "random")
    assert (attributes["n_layers"], attributes["d_model"], attributes["file_rows"]) == (LAYERS, WIDTH, 64)
    order = np.lexsort((group["position"][:], group["sequence"][:]))
    for place, x in zip(("inputs", "outputs"), activations(), strict=True):
        found = decoded_with_numpy(group, place, attributes)[order]
        error = np.square(found - x.numpy()).sum()
        assert error <= WORST[codec] * np.square(x.numpy() - x.numpy().mean(axis=0)).sum()
        ours = open_store(tmp_path, [reopen(tmp_path)]).read("train", 0, TOKENS)
        np.testing.assert_allclose(found, getattr(ours, place).numpy(), rtol=1e-4, atol=1e-4)


def decoded_with_numpy(group: zarr.Group, place: str, attributes: dict) -> np.ndarray:
    inner = group[place]
    if attributes["codec"] == "float32":
        return inner["values"][:]
    if attributes["codec"] == "bf16":
        return (inner["values"][:].astype(np.uint32) << 16).view(np.float32)
    each = attributes["group_channels"]
    codes = inner["codes"][:]
    if attributes["codec"] == "entropy":
        u = codes * inner["step"][:][:, None] * np.repeat(2.0 ** inner["shifts"][:].astype(float), each, axis=2)
    else:
        scales = np.repeat(2.0 ** ((inner["scales"][:].astype(float) - 96) / 8), each, axis=2)
        if attributes["codec"] == "int8":
            u = codes * scales
        else:
            levels, size = attributes["levels"], attributes["rotation"]
            bits = {16: 4, 4: 2}[levels]
            parts = [(codes >> (bits * part)) & (levels - 1) for part in range(8 // bits)]
            u = (np.concatenate(parts, axis=2) + 0.5 - levels / 2) * scales
            block = np.ones((1, 1))
            while len(block) < size:
                block = np.kron([[1, 1], [1, -1]], block)
            u = (u.reshape(*u.shape[:2], -1, size) @ block / size**0.5).reshape(u.shape)
    return u * inner["scale"][:] + inner["center"][:]


def test_arrays_are_chunked_and_checked_as_the_schema_says(tmp_path: Path) -> None:
    write_shard(tmp_path, Config("int4", layout=Layout(TOKENS, 16, 4, 2)))
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    codes, scales, sequence = group["inputs/codes"], group["outputs/scales"], group["sequence"]
    shape = (LAYERS, WIDTH // 2)
    assert (codes.shape, codes.chunks, codes.shards) == ((TOKENS, *shape), (16, *shape), (64, *shape))
    assert (scales.shape, scales.chunks, scales.dtype) == ((TOKENS, LAYERS, 2), (16, LAYERS, 2), np.dtype("uint8"))
    assert (sequence.chunks, sequence.shards, sequence.dtype) == ((64,), (64,), np.dtype("int64"))
    inner = codes.metadata.codecs[0].codecs
    assert [type(codec).__name__ for codec in inner] == ["BytesCodec", "ZstdCodec", "Crc32cCodec"]


@pytest.mark.parametrize(
    ("level", "names"), [(0, ["BytesCodec", "Crc32cCodec"]), (1, ["BytesCodec", "ZstdCodec", "Crc32cCodec"])]
)
def test_codes_are_compressed_only_if_asked_for_or_entropy_coded(tmp_path: Path, level: int, names: list[str]) -> None:
    for codec in ("int8", "entropy"):
        write_shard(tmp_path / codec, Config(codec, layout=Layout(TOKENS, 16, 4, level)))
        array = zarr.open_group(tmp_path / codec / GROUP, mode="r")["inputs/codes"]
        found = [type(part).__name__ for part in array.metadata.codecs[0].codecs]
        assert found == (names if codec == "int8" else ["BytesCodec", "ZstdCodec", "Crc32cCodec"])


def test_another_schema_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("circuitmill.stores.activation_schema.SCHEMA_VERSION", 1)
        write_shard(tmp_path, Config())
    with pytest.raises(StoreError, match=r"schema version 2; found 1(.|\n)*rerun stage cache"):
        reopen(tmp_path)


@pytest.mark.parametrize("n_rows", [1, 11, 640, 9_999, 10_000, 65_537])
@pytest.mark.parametrize(("codec", "row_bytes"), [("int8", 64), ("int4", 32), ("int2", 16), ("float32", 256)])
def test_chunks_have_the_least_size_and_waste_no_more_than_a_row_each(codec: str, row_bytes: int, n_rows: int) -> None:
    chunk = chunk_rows(make_codec(codec, 2, 32, 16), n_rows, chunk_bytes=10_000)
    n_chunks = -(-n_rows // chunk)
    assert chunk * row_bytes >= 10_000 or n_chunks == 1
    assert n_chunks <= max(1, n_rows // -(-10_000 // row_bytes))
    assert chunk * n_chunks - n_rows < n_chunks


def test_files_are_spans_of_the_corpus_in_an_order_of_their_own() -> None:
    assert (LAYOUT.file_rows, LAYOUT.n_files) == (64, 5)
    assert [LAYOUT.span(file) for file in range(5)] == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 300)]
    orders = [LAYOUT.order(file, seed).tolist() for file in (0, 1) for seed in (0, 1)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert LAYOUT.order(0, 1).tolist() == orders[1]
    assert sorted(LAYOUT.order(4, 0)) == list(range(44))
