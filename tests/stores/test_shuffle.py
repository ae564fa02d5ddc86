"""Two tokens of one document meet in a batch about as rarely as if every batch were drawn from the whole split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stores.small_store import Config, write_shards

from circuitmill.stores import activation_schema, batches
from circuitmill.stores.activation_schema import Layout
from circuitmill.stores.activation_shard import ShardBlocks
from circuitmill.stores.batches import BatchSource

SHARD, N_SHARDS, BATCH, EPOCHS = 4096, 3, 256, 3
TOTAL = SHARD * N_SHARDS
LAYOUT = Layout(SHARD, 32, 32, 0)
"""Files of 1024 tokens: 12 of them, of 32 chunks each."""
STRATA = TOTAL // 1024


def documents() -> np.ndarray:
    """Which document each token is of: 8 to 40 tokens, one after the other; some lie in two files or shards."""
    lengths = np.random.default_rng(0).integers(8, 41, TOTAL // 8)
    return np.repeat(np.arange(len(lengths)), lengths)[:TOTAL]


def made(folder: Path) -> ShardBlocks:
    """A store in which the first number of a token is the token's."""
    parts = []
    for first in range(0, TOTAL, SHARD):
        x = torch.zeros(SHARD, 2, 4)
        x[:, 0, 0] = torch.arange(first, first + SHARD)
        x[:, 1, 0] = 1
        parts.append((x, x))
    return ShardBlocks(write_shards(folder, Config("float32", layout=LAYOUT), parts))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ShardBlocks:
    return made(tmp_path_factory.mktemp("shuffle"))


def pairs_of(document: np.ndarray) -> int:
    """Pairs of tokens of one document."""
    counts = np.unique(document, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def ratios(blocks: ShardBlocks, pool: int, seed: int = 0) -> np.ndarray:
    """Per epoch: pairs of one document in all batches, over what is expected without replacement from everything."""
    document = documents()
    # of all pairs of tokens, so many are of one document, and a batch holds so many pairs
    expected = pairs_of(document) / (TOTAL * (TOTAL - 1) / 2) * (BATCH * (BATCH - 1) / 2)
    found = []
    with BatchSource(blocks, seed=seed, batch_tokens=BATCH, pool_tokens=pool) as source:
        count = source.n_batches_per_epoch
        for epoch in range(EPOCHS):
            drawn = [
                source.batch(epoch * count + index).inputs.arrays["values"][:, 0, 0].long().numpy()
                for index in range(count)
            ]
            assert len(np.unique(np.concatenate(drawn))) == count * BATCH
            found.append(sum(pairs_of(document[tokens]) for tokens in drawn) / (expected * count))
    return np.array(found)


POOLS = [TOTAL, TOTAL // 4, TOTAL // 8, 2 * STRATA * 32, STRATA * 32]


@pytest.mark.parametrize("pool", POOLS)
def test_pairs_of_one_document_are_as_rare_as_in_a_uniform_draw(blocks: ShardBlocks, pool: int) -> None:
    """Down to pools of one chunk a file, 3% of the split."""
    found = ratios(blocks, pool)
    expected = pairs_of(documents()) * EPOCHS * BATCH / TOTAL
    assert expected**-0.5 < 0.03, "the standard error of a count of rare events"
    assert found.mean() == pytest.approx(1, abs=0.1)


def test_the_measure_finds_pools_of_neighbouring_tokens(blocks: ShardBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "spread_evenly", lambda strata, _generator: np.arange(len(strata)))
    assert ratios(blocks, TOTAL // 8).mean() > 2


def test_the_measure_finds_chunks_of_neighbouring_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would be if rows were not shuffled in their file."""
    monkeypatch.setattr(
        activation_schema.Layout, "order", lambda self, file, _seed: np.arange(self.span(file)[1] - self.span(file)[0])
    )
    assert ratios(made(tmp_path), 2 * STRATA * 32).mean() > 2


def test_the_measure_finds_a_random_order_of_blocks(blocks: ShardBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks drawn without regard to their file come in twos and threes of one file: worse in small pools."""
    monkeypatch.setattr(batches, "spread_evenly", lambda strata, generator: generator.permutation(len(strata)))
    assert ratios(blocks, STRATA * 32).mean() > 1.5


def test_a_uniform_draw_has_the_ratio_one() -> None:
    document, rng = documents(), np.random.default_rng(5)
    expected = pairs_of(document) / (TOTAL * (TOTAL - 1) / 2) * (BATCH * (BATCH - 1) / 2)
    found = [
        pairs_of(document[part]) for _ in range(EPOCHS) for part in np.split(rng.permutation(TOTAL), TOTAL // BATCH)
    ]
    assert np.mean(found) / expected == pytest.approx(1, abs=0.05)
