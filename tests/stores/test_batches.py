import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stores.small_store import LAYERS, Config, activations, flip, write_shards

from circuitmill.core.codecs import Channels, Codec
from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.activation_schema import GROUP, Layout
from circuitmill.stores.activation_shard import ActivationShard, ShardBlocks
from circuitmill.stores.batches import BatchSource, spread_evenly

SIZES = (150, 97, 64)
TOTAL = sum(SIZES)
WIDTH = 16
SHORT = Layout(0, 16, 2, 0)


def parts() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs whose first number is the token's, so that batches can be told apart."""
    made, first = [], 0
    for index, size in enumerate(SIZES):
        inputs = activations(size, index, WIDTH)[0] * (index + 1)
        inputs[:, 0, 0] = torch.arange(first, first + size)
        made.append((inputs, -inputs))
        first += size
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ActivationShard]:
    return write_shards(tmp_path_factory.mktemp("shards"), Config("float32", layout=SHORT), parts())


def source_of(
    shards: list[ActivationShard], *, seed: int = 0, batch: int = 20, pool: int = 80, rows: slice | None = None
) -> BatchSource:
    return BatchSource(ShardBlocks(shards), seed=seed, batch_tokens=batch, pool_tokens=pool, rows=rows)


def numbers(source: BatchSource, index: int) -> list[int]:
    return source.batch(index).inputs.decode()[:, 0, 0].int().tolist()


class Memory:
    """Blocks in memory; the value of a token is its number."""

    def __init__(self, sizes: list[int]) -> None:
        self.codec = Codec("float32", 1, 1)
        self.channels = {"inputs": Channels.neutral(1, 1)}
        self.sizes = np.array(sizes)
        self.strata = np.arange(len(sizes)) % 3
        self._ends = np.cumsum(self.sizes)

    def read(self, block: int) -> dict:
        low = self._ends[block] - self.sizes[block]
        return {("inputs", "values"): np.arange(low, self._ends[block], dtype=np.float32).reshape(-1, 1, 1)}


@pytest.mark.parametrize("pool", [20, 80, 10_000])
def test_an_epoch_visits_every_token_at_most_once(shards: list[ActivationShard], pool: int) -> None:
    with source_of(shards, pool=pool) as source:
        assert source.n_batches_per_epoch == TOTAL // 20
        for epoch in range(3):
            first = epoch * source.n_batches_per_epoch
            seen = Counter(number for index in range(first, first + TOTAL // 20) for number in numbers(source, index))
            assert set(seen.values()) == {1}
            assert len(seen) == TOTAL // 20 * 20 and set(seen) <= set(range(TOTAL))


def test_a_batch_may_span_many_pools() -> None:
    """Blocks are not cut, so pools of unequal blocks may be smaller than a batch."""
    with BatchSource(Memory([40] * 5 + [3] * 40), seed=0, batch_tokens=40, pool_tokens=40) as source:
        sizes = np.diff(source._plan(0).ends, prepend=0)
        assert source.n_pools == 8 and (sizes < 40 // 2).sum() > 2
        seen = [source.batch(index).inputs.arrays["values"].flatten() for index in range(source.n_batches_per_epoch)]
    assert sorted(torch.cat(seen).int().tolist()) == list(range(320))


def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a pool waits until it has been read: the next pool is there before the last batch is copied."""
    ask = BatchSource._request

    def waits(self: BatchSource, epoch: int, number: int) -> object:
        asked = ask(self, epoch, number)
        asked.exception()
        return asked

    monkeypatch.setattr(BatchSource, "_request", waits)


@pytest.mark.parametrize("batch", [20, 33])
def test_memory_of_pools_is_used_again_without_touching_batches(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    in_step(monkeypatch)
    blocks = Memory([11] * 60)
    kept, copies, pools = [], [], set()
    with BatchSource(blocks, seed=0, batch_tokens=batch, pool_tokens=66) as source:
        per_epoch = source.n_batches_per_epoch
        for index in range(4 * per_epoch):
            values = source.batch(index).inputs.arrays["values"]
            kept.append(values)
            copies.append(values.clone())
            pools |= {future.result()["inputs", "values"].ctypes.data for future in source._pools.values()}
    assert len(pools) <= 4, "memory is used again"
    assert all(torch.equal(now, then) for now, then in zip(kept, copies, strict=True))
    for epoch in range(4):
        seen = torch.cat(kept[epoch * per_epoch : (epoch + 1) * per_epoch]).flatten().tolist()
        assert len(set(seen)) == len(seen)


def test_outputs_belong_to_their_inputs(shards: list[ActivationShard]) -> None:
    with source_of(shards) as source:
        for index in range(20):
            batch = source.batch(index)
            inputs = batch.inputs.decode()
            assert inputs.shape == (20, LAYERS, WIDTH)
            assert torch.equal(batch.outputs.decode(), -inputs)


def test_any_batch_can_be_had_without_those_before(shards: list[ActivationShard]) -> None:
    with source_of(shards) as source:
        straight = [numbers(source, index) for index in range(40)]
    with source_of(shards) as source:
        for index in (39, 3, 17, 18, 0, 31, 30, 2, 15):
            assert numbers(source, index) == straight[index]


@pytest.mark.parametrize("pool", [24, 80, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_of_all_ranks_are_the_global_batch(shards: list[ActivationShard], ranks: int, pool: int) -> None:
    with source_of(shards, pool=pool) as source:
        whole = [source.batch(index) for index in range(33)]
    share = 20 // ranks
    sources = [source_of(shards, pool=pool, rows=slice(n * share, (n + 1) * share)) for n in range(ranks)]
    for index, expected in enumerate(whole):
        found = [source.batch(index) for source in sources]
        for side in ("inputs", "outputs"):
            rows = [getattr(batch, side).arrays["values"] for batch in found]
            assert {len(part) for part in rows} == {share}
            assert torch.equal(torch.cat(rows), getattr(expected, side).arrays["values"])
    for source in sources:
        source.close()


def test_seed_and_epoch_change_the_order(shards: list[ActivationShard]) -> None:
    with source_of(shards) as one, source_of(shards, seed=1) as two, source_of(shards) as again:
        first = numbers(one, 0)
        assert first == numbers(again, 0)
        assert first != numbers(two, 0)
        assert first != numbers(one, one.n_batches_per_epoch)


def test_batches_mix_all_shards_of_a_pool(shards: list[ActivationShard]) -> None:
    edges = np.cumsum(SIZES)
    with source_of(shards, pool=10_000) as source:
        for index in range(source.n_batches_per_epoch):
            assert len(set(np.searchsorted(edges, numbers(source, index), side="right"))) == len(SIZES)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "int2", "entropy"])
def test_batches_hold_what_is_stored(tmp_path: Path, codec: str) -> None:
    """Every stored row of every array once, with its neighbours of the same token."""
    shards = write_shards(tmp_path, Config(codec, layout=SHORT), parts())
    chunks = [shard.read_chunk(n) for shard in shards for n in range(-(-shard.n_tokens // shard.chunk))]
    expected = sorted(
        b"".join(array[row].tobytes() for array in part.values())
        for part in chunks
        for row in range(len(next(iter(part.values()))))
    )
    with source_of(shards, batch=TOTAL, pool=TOTAL) as source:
        batch = source.batch(0)
    sides = (batch.inputs, batch.outputs)
    arrays = [side.arrays[name].numpy() for side in sides for name in side.codec.arrays()]
    assert sorted(b"".join(array[row].tobytes() for array in arrays) for row in range(TOTAL)) == expected
    assert torch.equal(batch.inputs.channels.center, shards[0].channels["inputs"].center)


def test_inputs_alone_come_without_outputs(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, Config("float32", ("inputs",), SHORT), parts())
    with source_of(shards) as source:
        batch = source.batch(0)
    assert batch.outputs is None and len(batch.inputs) == 20


def test_two_pools_at_most_are_in_memory_and_no_thread_stays(shards: list[ActivationShard]) -> None:
    with source_of(shards) as source:
        assert source.n_pools == 4
        for index in range(30):
            source.batch(index)
            assert len(source._pools) <= 2 and len(source._spare) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("pool", "block-reader"))]


def test_batch_and_pool_must_fit(shards: list[ActivationShard]) -> None:
    with pytest.raises(ConfigError, match=r"at most 311 tokens(.|\n)*found 312(.|\n)*train\.batch_tokens"):
        source_of(shards, batch=312, pool=400)
    with pytest.raises(ConfigError, match=r"at least one batch \(20 tokens\); found 19(.|\n)*train\.pool_tokens"):
        source_of(shards, pool=19)


def test_damage_reaches_the_caller_and_again(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, Config("int8", layout=SHORT), parts())
    flip(tmp_path / "train-00001" / GROUP / "inputs" / "codes" / "c" / "0" / "0" / "0", 5)
    with source_of(shards, pool=10_000) as source:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"train-00001"):
                source.batch(0)


def test_damage_in_a_later_pool_leaves_the_batches_before_it(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, Config("int8", layout=SHORT), parts())
    with source_of(shards, pool=60) as source:
        whole = [source.batch(index).inputs.arrays["codes"] for index in range(15)]
        last = source._plan(0).pools[-1]
        damaged = max(block for block in last.tolist())
        ends = source._plan(0).ends
    shard = int(np.searchsorted(source._blocks._starts, damaged, side="right")) - 1
    block = damaged - source._blocks._starts[shard]
    file, within = divmod(block, 2)
    path = tmp_path / f"train-{shard:05d}" / GROUP / "inputs" / "codes" / "c" / str(file) / "0" / "0"
    flip(path, within * (16 * LAYERS * WIDTH + 4) + 7)
    with source_of(shards, pool=60) as source:
        good = int(ends[-2]) // 20
        for index in range(good):
            assert torch.equal(source.batch(index).inputs.arrays["codes"], whole[index])
        with pytest.raises(StoreError, match=rf"train-{shard:05d}"):
            source.batch(good)


@pytest.mark.parametrize("counts", [[5], [8] * 12, [32, 32, 32, 7, 1], [1] * 20, [3, 50, 11, 11, 29]])
def test_any_run_of_blocks_holds_its_share_of_every_stratum(counts: list[int]) -> None:
    strata = np.repeat(np.arange(len(counts)), counts)
    # exactly so with equal strata; else a run may be longer or shorter than its stretch of the epoch
    most = 1 if len(set(counts)) == 1 else 2
    for seed in range(20):
        order = spread_evenly(strata, np.random.default_rng(seed))
        assert sorted(order) == list(range(len(strata)))
        at = np.zeros((len(strata) + 1, len(counts)))
        at[1:] = np.cumsum(np.eye(len(counts))[strata[order]], axis=0)
        for length in range(1, len(strata) + 1):
            found = at[length:] - at[:-length]
            share = length * np.array(counts) / len(strata)
            assert np.abs(found - share).max() < most


def test_blocks_of_a_stratum_come_in_any_order() -> None:
    strata = np.repeat([0, 1], 6)
    orders = [spread_evenly(strata, np.random.default_rng(seed)) for seed in range(600)]
    first = Counter(int(order[0]) for order in orders)
    assert set(first) == set(range(12)) and max(first.values()) < 2 * 600 / 12
