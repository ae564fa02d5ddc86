import gc
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import REPOSITORY
from tests.lm.streaming import BATCH, BOS, DirectBlocks, expected_model, live_blocks, load, make_tokens

from circuitmill.core.codecs import StoredBatch
from circuitmill.errors import ClientError, DivergedError, UpstreamError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.stream import LiveBlocks
from circuitmill.stores.batches import BatchSource

SOON = 30.0
"""Seconds after which something that should happen at once has not happened, on a machine with other work."""


@pytest.fixture(scope="module")
def live(tiny_model_dir: Path) -> Iterator[LiveBlocks]:
    with live_blocks(tiny_model_dir) as blocks:
        yield blocks


@pytest.fixture(scope="module")
def direct(tiny_model_dir: Path) -> DirectBlocks:
    return DirectBlocks(load(tiny_model_dir), make_tokens())


def source(blocks: LiveBlocks | DirectBlocks, rows: slice | None = None) -> BatchSource:
    return BatchSource(blocks, seed=3, batch_tokens=64, pool_tokens=400, rows=rows)


def same(one: StoredBatch, two: StoredBatch) -> bool:
    return all(
        torch.equal(getattr(one, place).arrays["values"], getattr(two, place).arrays["values"])
        for place in ("inputs", "outputs")
    )


def segments(pid: int | str = "self") -> list[int]:
    """Sizes of the shared memory that a process has mapped."""
    gc.collect()
    lines = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:circuitmill-stream" in line]
    spans = [line.split()[0].split("-") for line in lines]
    return [int(high, 16) - int(low, 16) for low, high in spans]


def ends(pid: int) -> bool:
    """Wait for the end of a process that is not our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], SOON)[0])
    finally:
        os.close(handle)


def test_batches_are_those_of_the_model(live: LiveBlocks, direct: DirectBlocks) -> None:
    with source(live) as ours, source(direct) as theirs:
        assert ours.n_pools == 3 and ours.n_batches_per_epoch > 15
        for index in range(ours.n_batches_per_epoch + 3):
            assert same(ours.batch(index), theirs.batch(index))


def test_an_epoch_is_the_corpus(live: LiveBlocks, tiny_model_dir: Path) -> None:
    tokens = torch.from_numpy(make_tokens().astype(np.int64))
    expected = torch.cat([side[tokens != BOS].flatten(1) for side in capture_mlp(load(tiny_model_dir), tokens)], dim=1)
    with BatchSource(live, seed=0, batch_tokens=int(live.sizes.sum()), pool_tokens=10**6) as ours:
        batch = ours.batch(0)
    found = torch.cat([batch.inputs.decode().flatten(1), batch.outputs.decode().flatten(1)], dim=1)
    assert found.shape == expected.shape
    distance = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(dim=0).values.max() < 1e-4 and distance.min(dim=1).values.max() < 1e-4


def test_neighbours_are_in_different_blocks(live: LiveBlocks) -> None:
    tokens = make_tokens()
    blocks = [live.sequences(block) for block in range(live.n_blocks)]
    assert sorted(map(bytes, np.concatenate(blocks))) == sorted(map(bytes, tokens))
    assert max(map(len, blocks)) == BATCH and min(map(len, blocks)) >= BATCH - 1
    assert np.array_equal(blocks[2][:2], tokens[[2, 2 + live.n_blocks]])


def test_blocks_come_in_any_order_to_any_thread(live: LiveBlocks, direct: DirectBlocks) -> None:
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(live.n_blocks), 3))
    with ThreadPoolExecutor(5) as pool:
        for block, rows in zip(order, pool.map(live.read, order.tolist()), strict=True):
            assert all(np.array_equal(rows[key], expected) for key, expected in direct.read(block).items())


def test_any_batch_can_be_had_without_those_before(live: LiveBlocks, direct: DirectBlocks) -> None:
    with source(direct) as straight, source(live) as ours:
        for index in (29, 3, 17, 18, 0):
            assert same(ours.batch(index), straight.batch(index))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_slices_are_the_batch(live: LiveBlocks, direct: DirectBlocks, ranks: int) -> None:
    width = 64 // ranks
    with source(direct) as whole:
        for rank in range(ranks):
            rows = slice(rank * width, (rank + 1) * width)
            with source(live, rows) as mine:
                for index in (0, 7, 20):
                    expected, found = whole.batch(index), mine.batch(index)
                    assert torch.equal(found.inputs.arrays["values"], expected.inputs.arrays["values"][rows])
                    assert torch.equal(found.outputs.arrays["values"], expected.outputs.arrays["values"][rows])


def test_memory_is_that_of_the_slots_and_has_no_name(live: LiveBlocks) -> None:
    block = int(live.sizes.max()) * 2 * 16 * 4 * 2 + BATCH * 32 * 4
    assert block * 2 <= segments()[0] <= block * 2 + 2 * 3 * 64 + 4096
    for number in range(live.n_blocks):
        live.read(number)
    assert segments() == segments(live.producer_pid) and len(segments()) == 1
    assert "/dev/shm/" not in Path(f"/proc/{live.producer_pid}/maps").read_text()


def test_signals_to_the_whole_job_leave_the_producer_alone(live: LiveBlocks, direct: DirectBlocks) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(live.producer_pid, number)
    assert np.array_equal(live.read(4)["inputs", "values"], direct.read(4)["inputs", "values"])


def test_reading_without_a_producer(tiny_model_dir: Path) -> None:
    with pytest.raises(ClientError, match="has not been started, or was closed"):
        live_blocks(tiny_model_dir).read(0)


@pytest.mark.slow
def test_a_killed_producer_is_an_error_for_all_who_wait(tiny_model_dir: Path) -> None:
    before = segments()
    with live_blocks(tiny_model_dir) as blocks, source(blocks) as batches, ThreadPoolExecutor(1) as pool:
        assert len(segments()) == len(before) + 1
        blocks.read(0)
        os.kill(blocks.producer_pid, signal.SIGSTOP)
        waiting = pool.submit(batches.batch, 0)
        os.kill(blocks.producer_pid, signal.SIGKILL)
        with pytest.raises(ClientError, match=r"ended by SIGKILL(.|\n)*lower cache.batch_sequences"):
            waiting.result(SOON)
        with pytest.raises(ClientError, match="ended by SIGKILL"):
            blocks.read(1)
    assert segments() == before


@pytest.mark.slow
def test_closing_a_busy_producer_takes_no_time(tiny_model_dir: Path) -> None:
    before, blocks = segments(), live_blocks(tiny_model_dir)
    with source(blocks) as batches, ThreadPoolExecutor(1) as pool:
        with blocks:
            blocks.read(0)
            pid = blocks.producer_pid
            # whatever keeps it busy
            os.kill(pid, signal.SIGSTOP)
            waiting = pool.submit(batches.batch, 0)
        with pytest.raises(ClientError):
            waiting.result(SOON)
        assert not Path(f"/proc/{pid}").exists()
    assert blocks.producer_pid is None and segments() == before
    with pytest.raises(ClientError, match="was closed"):
        blocks.read(0)


@pytest.mark.slow
def test_what_is_not_finite_reaches_all_readers(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with live_blocks(folder) as blocks, ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(blocks.read, block) for block in range(6)]:
            with pytest.raises(
                DivergedError, match=r"finite activations; found NaN or infinity\n  where: outputs at mlp.1 of"
            ):
                found.result(SOON)


@pytest.mark.slow
def test_another_model_than_the_calibrated_one(tiny_model_dir: Path) -> None:
    model = expected_model(tiny_model_dir)
    other = type(model)(model.model, None, "cpu", model.n_layers, model.d_model, "0" * 64)
    blocks = LiveBlocks(other, make_tokens(), bos_id=BOS, batch_sequences=BATCH)
    with blocks, pytest.raises(UpstreamError, match="model 000000000000 of 2 layers and d_model 16"):
        blocks.read(0)


@pytest.mark.slow
def test_errors_of_the_model_itself(tiny_model_dir: Path) -> None:
    tokens = make_tokens()
    tokens[4, 9] = 10_000
    blocks = LiveBlocks(expected_model(tiny_model_dir), tokens, bos_id=BOS, batch_sequences=len(tokens))
    with blocks, pytest.raises(ClientError, match="found IndexError: index out of range"):
        blocks.read(0)


@pytest.mark.slow
def test_a_model_in_bfloat16_and_inputs_alone(tiny_model_dir: Path) -> None:
    model, tokens = expected_model(tiny_model_dir, "bfloat16"), make_tokens()
    expected = DirectBlocks(load(tiny_model_dir, "bfloat16"), tokens)
    with LiveBlocks(model, tokens, bos_id=BOS, batch_sequences=BATCH, outputs=False, threads=1) as blocks:
        assert list(blocks.channels) == ["inputs"] and blocks.codec.name == "bf16"
        for block in range(3):
            rows = blocks.read(block)
            assert list(rows) == [("inputs", "values")]
            assert np.array_equal(rows["inputs", "values"], expected.read(block)["inputs", "values"])
        with source(blocks) as batches:
            assert batches.batch(0).outputs is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "busy"), (signal.SIGTERM, "idle"), (signal.SIGINT, "busy")]
)
def test_the_producer_ends_with_its_parent(tiny_model_dir: Path, number: signal.Signals, how: str) -> None:
    with _parent(tiny_model_dir, how) as parent:
        producer = int(parent.stdout.readline())
        parent.send_signal(number)
        try:
            assert ends(producer)
            assert parent.wait(SOON) != 0
        finally:
            # whatever went wrong: leaving `with` waits for it
            parent.kill()


@pytest.mark.slow
def test_python_ends_although_closing_was_forgotten(tiny_model_dir: Path) -> None:
    with _parent(tiny_model_dir, "forgotten") as parent:
        producer = int(parent.stdout.readline())
        assert parent.wait(SOON) == 0
        assert ends(producer)


def _parent(folder: Path, how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lm.streaming", str(folder), how],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
