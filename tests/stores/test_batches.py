from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.activation_schema import GROUP
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.activation_writer import Layout, ShardWriter
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.quantize import make_codec

SIZES = (150, 97, 64)
LAYERS, WIDTH = 2, 16
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ActivationShard]:
    """Three float32 shards in which a token's first input is its number, so that batches can be told apart."""
    return _make(tmp_path_factory.mktemp("shards"), "float32")


def _make(folder: Path, codec_name: str) -> list[ActivationShard]:
    result, first = [], 0
    codec = make_codec(codec_name, LAYERS, WIDTH, 8)
    for index, size in enumerate(SIZES):
        numbers = torch.arange(first, first + size, dtype=torch.float32)
        inputs = torch.randn(size, LAYERS, WIDTH, generator=torch.Generator().manual_seed(index)) * (index + 1)
        if codec_name == "float32":
            inputs[:, 0, 0] = numbers
        name = f"train-{index:05d}"
        output = StageOutput("cache", codec, {}, folder / name, unit=name)
        where = np.arange(size)
        provenance = {"sequence": where, "position": where, "token_id": where}
        writer = ShardWriter(output, codec, Layout(16, 2, 64, 1), provenance, {"n_layers": LAYERS, "d_model": WIDTH})
        writer.append(inputs, -inputs)
        result.append(ActivationShard(output.finish(writer.finish())))
        first += size
    return result


def _source(shards: list[ActivationShard], seed: int = 0, batch: int = 20, pool: int = 80) -> BatchSource:
    return BatchSource(shards, seed=seed, batch_tokens=batch, pool_tokens=pool)


def _numbers(source: BatchSource, index: int) -> list[int]:
    return source.batch(index)[0][:, 0, 0].int().tolist()


@pytest.mark.parametrize("pool", [20, 80, 10_000])
def test_an_epoch_visits_every_token_at_most_once(shards: list[ActivationShard], pool: int) -> None:
    with _source(shards, pool=pool) as source:
        assert source.n_batches_per_epoch == TOTAL // 20
        seen = Counter(number for index in range(source.n_batches_per_epoch) for number in _numbers(source, index))
    assert set(seen.values()) == {1}
    assert len(seen) == TOTAL // 20 * 20


def test_outputs_belong_to_their_inputs(shards: list[ActivationShard]) -> None:
    with _source(shards) as source:
        for index in range(20):
            inputs, outputs = source.batch(index)
            assert inputs.shape == (20, LAYERS, WIDTH)
            assert torch.equal(outputs, -inputs)


def test_any_batch_can_be_had_without_those_before(shards: list[ActivationShard]) -> None:
    with _source(shards) as source:
        straight = [_numbers(source, index) for index in range(40)]
    with _source(shards) as source:
        for index in (39, 3, 17, 18, 0, 31):
            assert _numbers(source, index) == straight[index]


def test_seed_and_epoch_change_the_order(shards: list[ActivationShard]) -> None:
    with _source(shards) as one, _source(shards, seed=1) as two:
        first = _numbers(one, 0)
        assert first != _numbers(two, 0)
        assert first != _numbers(one, one.n_batches_per_epoch)


def test_batches_mix_all_shards_of_a_pool(shards: list[ActivationShard]) -> None:
    edges = np.cumsum(SIZES)
    with _source(shards, pool=10_000) as source:
        for index in range(source.n_batches_per_epoch):
            assert len(set(np.searchsorted(edges, _numbers(source, index), side="right"))) == len(SIZES)


def test_every_shards_own_channel_scales_are_used(tmp_path: Path) -> None:
    shards = _make(tmp_path, "int8")
    expected = torch.cat([shard.decoded("inputs", 0, shard.n_tokens) for shard in shards])
    with _source(shards, batch=TOTAL, pool=TOTAL) as source:
        inputs, _ = source.batch(0)
    ours = sorted(map(tuple, inputs.flatten(1).tolist()))
    assert ours == sorted(map(tuple, expected.flatten(1).tolist()))


def test_memory_holds_two_pools_at_most(shards: list[ActivationShard]) -> None:
    with _source(shards) as source:
        assert source.n_pools == 4
        for index in range(30):
            source.batch(index)
            assert len(source._pools) <= 2


def test_batch_and_pool_must_fit(shards: list[ActivationShard]) -> None:
    with pytest.raises(ConfigError, match=r"at most 311 tokens(.|\n)*found 312(.|\n)*train\.batch_tokens"):
        _source(shards, batch=312, pool=400)
    with pytest.raises(ConfigError, match=r"at least one batch \(20 tokens\); found 19(.|\n)*train\.pool_tokens"):
        _source(shards, pool=19)


def test_damage_reaches_the_caller(tmp_path: Path) -> None:
    shards = _make(tmp_path, "int8")
    path = tmp_path / "train-00001" / GROUP / "inputs" / "codes" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with _source(shards, pool=10_000) as source, pytest.raises(StoreError, match=r"train-00001"):
        source.batch(0)
