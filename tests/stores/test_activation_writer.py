import contextlib
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stores.small_store import (
    ALL_CODECS,
    BATCH,
    LAYERS,
    LAYOUT,
    TOKENS,
    Config,
    activations,
    all_bytes,
    append_all,
    open_writer,
    provenance,
    reopen,
    write_shard,
)

from circuitmill.core.codecs import make_codec
from circuitmill.errors import DivergedError, ShapeError
from circuitmill.stores import activation_writer
from circuitmill.stores.activation_schema import GROUP, Layout
from circuitmill.stores.activation_writer import ShardWriter, nmse
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.normalization import load_moments


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(folder: Path, cfg: Config, tokens: int) -> int:
    """Begin a shard, or go on with it, and leave in the middle; returns how many tokens are durable."""
    _, writer = open_writer(folder, cfg, activations())
    with pytest.raises(Killed), writer:
        append_all(writer, activations(), tokens)
        # batches that wait are lost with the process; here they are written, so that the place is known
        while not writer._queue.empty() and writer._thread.is_alive():
            pass
        raise Killed
    return writer.rows_done


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_a_writer_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, codec: str) -> None:
    cfg = Config(codec)
    straight = write_shard(tmp_path / "straight", cfg)
    for tokens in (0, BATCH, 2 * BATCH, 6 * BATCH, TOKENS):
        folder = tmp_path / f"broken-{tokens}"
        done = killed_at(folder, cfg, tokens)
        assert done % 64 in (0, 44) and done <= tokens + BATCH
        # what a kill in the middle of a write leaves behind
        half = folder / GROUP / "inputs" / ("values" if codec in ("float32", "bf16") else "codes") / "c/4/0/.0.tmp"
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        again = write_shard(folder, cfg)
        assert again.digest == straight.digest
        assert all_bytes(folder) == all_bytes(tmp_path / "straight")


def test_a_writer_killed_many_times_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    straight = write_shard(tmp_path / "straight", Config())
    done = [killed_at(tmp_path / "broken", Config(), tokens) for tokens in (50, 111, 111, 222, 260)]
    assert done == sorted(done) and done[-1] >= 192
    assert write_shard(tmp_path / "broken", Config()).digest == straight.digest
    assert all_bytes(tmp_path / "broken") == all_bytes(tmp_path / "straight")


WHERE = ["write_chunks", "save_moments", "create_group", "atomic_write"]


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("call", [1, 2, 9])
def test_a_kill_inside_any_step_of_writing_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    straight = write_shard(tmp_path / "straight", Config())
    calls, real = [], getattr(activation_writer, name)

    def breaks(*arguments: object, **named: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(activation_writer, name, breaks)
        # some are called once only, and then it is not killed
        with contextlib.suppress(Killed):
            write_shard(tmp_path / "broken", Config())
    again = write_shard(tmp_path / "broken", Config())
    assert again.digest == straight.digest
    assert all_bytes(tmp_path / "broken") == all_bytes(tmp_path / "straight")


def test_a_kill_after_merging_the_moments_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = write_shard(tmp_path / "straight", Config())
    removed = []
    unlink = Path.unlink

    def breaks(self: Path, *, missing_ok: bool = False) -> None:
        removed.append(self)
        if self.parent.name == "partial" and len(removed) > 2:
            raise Killed
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", breaks)
        write_shard(tmp_path / "broken", Config())
    output, writer = open_writer(tmp_path / "broken", Config(), activations())
    with writer:
        assert writer.rows_done == TOKENS
        assert output.finish({**writer.finish(), "split": "train"}).digest == straight.digest


def test_how_tokens_are_appended_changes_nothing_but_sums(tmp_path: Path) -> None:
    """One call with all tokens, or one a token: the same rows; moments to the last places of float32."""
    straight = write_shard(tmp_path / "straight", Config())
    for size in (1, TOKENS):
        output, writer = open_writer(tmp_path / str(size), Config(), activations())
        with writer:
            for part in zip(*(x.split(size) for x in activations()), strict=True):
                writer.append(*part)
            output.finish({**writer.finish(), "split": "train"})
        ours, theirs = all_bytes(tmp_path / str(size)), all_bytes(straight.folder)
        assert {name for name in ours if ours[name] != theirs[name]} <= {"moments.safetensors"}
        one, two = (load_moments(folder / "moments.safetensors") for folder in (tmp_path / str(size), straight.folder))
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a.m2, b.m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_how_activations_lie_in_memory_changes_nothing(tmp_path: Path, codec: str) -> None:
    """Layer after layer, as they come from the model, or token after token."""
    straight = write_shard(tmp_path / "tokens", Config(codec))
    inputs, outputs = (x.movedim(1, 0).contiguous().movedim(0, 1) for x in activations())
    assert write_shard(tmp_path / "layers", Config(codec), (inputs, outputs)).digest == straight.digest
    assert all_bytes(tmp_path / "layers") == all_bytes(tmp_path / "tokens")


@pytest.mark.parametrize("codec", ALL_CODECS)
@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path, codec: str, where: str, bad: float) -> None:
    data = dict(zip(("inputs", "outputs"), activations(), strict=True))
    _, writer = open_writer(tmp_path, Config(codec), tuple(value.clone() for value in data.values()))
    data[where][70, 1, 3] = bad
    message = rf"finite MLP {where}(.|\n)*layer 1 of the model"
    with pytest.raises(DivergedError, match=message), writer:
        append_all(writer, (data["inputs"], data["outputs"]))
        writer.finish()
    assert writer.rows_done == 64
    assert not writer._thread.is_alive()
    for array in (tmp_path / GROUP).rglob("c"):
        if array.parent.name not in ("center", "scale", "step"):
            assert [path.name for path in array.iterdir()] == ["0"]
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["file-00000.safetensors"]
    assert not (tmp_path / "chunks.json").exists()


def test_an_error_of_the_thread_reaches_a_later_append(tmp_path: Path) -> None:
    inputs, outputs = activations()
    _, writer = open_writer(tmp_path, Config(), (inputs.clone(), outputs))
    inputs[3, 0, 0] = float("nan")
    with pytest.raises(DivergedError), writer:
        writer.append(inputs[:100], outputs[:100])
        writer._thread.join(10)
        assert not writer._thread.is_alive()
        writer.append(inputs[100:110], outputs[100:110])
        pytest.fail("append went on after the thread had stopped")


def test_a_full_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(activation_writer, "write_chunks", full)
    _, writer = open_writer(tmp_path, Config(), activations())
    with pytest.raises(OSError, match="no space left"), writer:
        append_all(writer, activations())
        writer.finish()
    assert writer.rows_done == 0


def test_too_few_and_too_many_tokens_are_refused(tmp_path: Path) -> None:
    _, writer = open_writer(tmp_path / "few", Config(), activations())
    with pytest.raises(ShapeError, match=r"300 tokens; found 100"), writer:
        writer.append(*(x[:100] for x in activations()))
        writer.finish()
    _, writer = open_writer(tmp_path / "many", Config(), activations())
    with pytest.raises(ShapeError, match=r"300 tokens in the shard; found 301"), writer:
        writer.append(*(torch.cat([x, x[:1]]) for x in activations()))
    _, writer = open_writer(tmp_path / "many", Config(), activations())
    with pytest.raises(ShapeError, match=r"found 301"), writer:
        append_all(writer, activations())
        writer.append(*(x[:1] for x in activations()))


def test_leaving_with_an_exception_stops_the_thread_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    take, taken = ShardWriter._take, []

    def slow(self: ShardWriter, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        started.set()
        go_on.wait(10)
        taken.append(len(inputs))
        take(self, inputs, outputs)

    monkeypatch.setattr(ShardWriter, "_take", slow)
    _, writer = open_writer(tmp_path, Config(), activations())
    with pytest.raises(Killed), writer:
        writer.append(*(x[:10] for x in activations()))
        started.wait(10)
        for _ in range(2):
            writer.append(*(x[10:20] for x in activations()))
        threading.Timer(0.2, go_on.set).start()
        raise Killed
    assert not writer._thread.is_alive()
    assert taken == [10], "batches that wait are dropped"


def test_the_thread_may_take_a_batch_while_the_queue_is_emptied(tmp_path: Path) -> None:
    """The queue says it is not empty, and then the thread was faster: no error of the queue's own comes out."""
    _, writer = open_writer(tmp_path, Config(), activations())

    class Hasty(queue.Queue):
        def empty(self) -> bool:
            return False

    with pytest.raises(Killed), writer:
        hasty = Hasty(2)
        real, writer._queue = writer._queue, hasty
        threading.Timer(0.2, lambda: real.put(None)).start()
        raise Killed
    assert not writer._thread.is_alive()


@pytest.mark.parametrize("codec", ["float32", "int4"])
def test_rows_of_a_file_are_a_permutation_and_know_where_they_are_from(tmp_path: Path, codec: str) -> None:
    rng = np.random.default_rng(3)
    where = provenance(TOKENS, first=50)
    where["token_id"] = rng.permutation(10**6)[:TOKENS]
    shard_manifest = write_shard(tmp_path, Config(codec), where=where)
    shard = reopen(tmp_path)
    numbers = {int(token): index for index, token in enumerate(where["token_id"])}
    exact = write_shard(tmp_path / "exact", Config("float32"), where=where).folder
    originals = dict(zip(("inputs", "outputs"), activations(), strict=True))
    for file in range(shard.n_files):
        found = shard.provenance(file)
        tokens = np.array([numbers[int(token)] for token in found["token_id"]])
        assert sorted(tokens) == list(range(*LAYOUT.span(file)))
        assert list(tokens) != sorted(tokens)
        assert np.array_equal(found["sequence"], where["sequence"][tokens])
        assert np.array_equal(found["position"], where["position"][tokens])
        rows, ordered = shard.read_file(file, ("inputs", "outputs"))
        assert np.array_equal(ordered["token_id"], where["token_id"][slice(*LAYOUT.span(file))])
        if codec == "float32":
            low = file * LAYOUT.chunks_per_file
            for place in ("inputs", "outputs"):
                chunks = [shard.read_chunk(n)[place, "values"] for n in range(low, min(low + 4, 19))]
                assert np.array_equal(np.concatenate(chunks), originals[place][tokens].numpy())
                assert np.array_equal(rows[place, "values"], originals[place][slice(*LAYOUT.span(file))].numpy())
    assert shard_manifest.counts["tokens"] == TOKENS and exact.exists()


def reference_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.double()
    mean = wide.mean(dim=0)
    return mean, (wide - mean).square().sum(dim=0)


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_moments_are_those_of_the_unquantised_numbers(tmp_path: Path, codec: str) -> None:
    inputs, outputs = activations()
    inputs = inputs * torch.logspace(-2, 2, inputs.shape[2]) + 5 * torch.arange(inputs.shape[2])
    data = (inputs, outputs)
    write_shard(tmp_path, Config(codec), data)
    for moments, x in zip(load_moments(tmp_path / "moments.safetensors"), data, strict=True):
        mean, m2 = reference_moments(x)
        assert moments.count == TOKENS
        deviation = (m2 / TOKENS).sqrt()
        assert ((moments.mean - mean).abs() <= 1e-6 * (deviation + mean.abs())).all()
        torch.testing.assert_close(moments.m2, m2, rtol=2e-6, atol=0)
        torch.testing.assert_close(moments.sum_squares, x.double().square().sum(dim=(0, 2)), rtol=1e-6, atol=0)


def test_inputs_alone_are_stored_but_moments_are_of_both(tmp_path: Path) -> None:
    both = write_shard(tmp_path / "both", Config("int8"))
    alone = write_shard(tmp_path / "alone", Config("int8", ("inputs",)))
    assert not (tmp_path / "alone" / GROUP / "outputs").exists()
    assert not any(name.startswith("outputs") for name in alone.counts)
    one, two = (load_moments(folder.folder / "moments.safetensors") for folder in (both, alone))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.mean, b.mean) and torch.equal(a.m2, b.m2)
    for name, content in all_bytes(tmp_path / "alone" / GROUP / "inputs").items():
        assert (tmp_path / "both" / GROUP / "inputs" / name).read_bytes() == content
    with pytest.raises(DivergedError, match="finite MLP outputs"):
        inputs, outputs = activations()
        _, writer = open_writer(tmp_path / "bad", Config("int8", ("inputs",)), (inputs, outputs.clone()))
        outputs[0, 0, 0] = float("nan")
        with writer:
            append_all(writer, (inputs, outputs))
            writer.finish()


def test_the_error_in_the_manifest_is_that_of_the_codec(tmp_path: Path) -> None:
    """Measured on every eighth block; with one block a batch, on the first batches of every file."""
    for codec in ALL_CODECS:
        manifest: Manifest = write_shard(tmp_path / codec, Config(codec))
        found = {place: nmse([manifest.counts], place) for place in ("inputs", "outputs")}
        shard, data = reopen(tmp_path / codec), activations()
        for place, x in zip(("inputs", "outputs"), data, strict=True):
            encoded = make_codec(codec, LAYERS, x.shape[2], 16)
            channels = shard.channels[place]
            restored = encoded.decode(encoded.encode(x, channels), channels)
            exact = (restored - x).double().square().sum(dim=(0, 2)) / x.double().square().sum(dim=(0, 2))
            assert found[place] == pytest.approx(exact.tolist(), rel=0.25)
        assert nmse([{"inputs_error": [1.0, 2.0], "inputs_energy": [2.0, 8.0]}] * 3, "inputs") == [0.5, 0.25]
        assert nmse([{}], "outputs") is None


@pytest.mark.parametrize(
    ("codec", "most"), [("int8", 8.3), ("int4", 4.4), ("entropy", 4.4), ("int2", 2.4), ("bf16", 16.15)]
)
def test_bits_a_number_with_everything_counted(tmp_path: Path, codec: str, most: float) -> None:
    """All files below the group: metadata, constants, checksums and provenance. Chunks that divide the shard: what
    fills the last one up is a large part of so small a store."""
    n_tokens, width = 20_480, 128
    generator = torch.Generator().manual_seed(0)
    data = tuple(torch.randn(n_tokens, 4, width, generator=generator) for _ in range(2))
    layout = Layout(n_tokens, 128, 16, 0)
    output, writer = _wide_writer(tmp_path, codec, layout, data)
    with writer:
        for part in zip(*(x.split(2048) for x in data), strict=True):
            writer.append(*part)
        output.finish(writer.finish())
    size = sum(path.stat().st_size for path in (tmp_path / GROUP).rglob("*") if path.is_file())
    assert 8 * size / sum(x.numel() for x in data) <= most


def _wide_writer(folder: Path, codec: str, layout: Layout, data: tuple) -> tuple:
    """As `open_writer`, with groups of 32 channels and four layers."""
    from circuitmill.stores.calibration import PlaceCalibration
    from circuitmill.stores.manifest import StageOutput

    output = StageOutput("cache", Config(codec, layout=layout), {}, folder, unit="train-00000")
    channels = {
        place: PlaceCalibration.of(x[:1024]).channels(4.0) for place, x in zip(("inputs", "outputs"), data, strict=True)
    }
    where = {"sequence": np.arange(layout.n_rows) // 127, "position": np.arange(layout.n_rows) % 127 + 1}
    where["token_id"] = np.random.default_rng(0).zipf(1.2, layout.n_rows) % 50_000
    return output, ShardWriter(
        output,
        make_codec(codec, 4, data[0].shape[2], 32),
        layout,
        channels=channels,
        places=("inputs", "outputs"),
        provenance=where,
        attributes={},
        seed=0,
    )
