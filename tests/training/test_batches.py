import dataclasses
import threading

import pytest
import torch
from tests.training.helpers import D_MODEL, N_LAYERS, Memory, batches, scaling, tiny

from circuitmill.core.codecs import Channels, Encoded, StoredBatch, make_codec, plain_batch
from circuitmill.distributed import Ranks
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.training.parallel.collectives import Group
from circuitmill.training.parallel.layout import alone


def test_batches_are_scaled_and_read_one_ahead():
    source = Memory()
    with batches(tiny(), source=source) as data:
        x, y = data.get(4)
    assert source.asked[:1] == [4] and set(source.asked) <= {4, 5}
    raw_x, raw_y = Memory().pair(4)
    torch.testing.assert_close(x, scaling().inputs(raw_x), rtol=0, atol=0)
    torch.testing.assert_close(y, scaling().outputs(raw_y), rtol=0, atol=0)


def test_every_batch_is_read_once_in_a_row():
    source = Memory()
    with batches(tiny(), source=source) as data:
        for step in range(5):
            data.get(step)
    assert source.asked in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])


def test_a_jump_gives_the_batch_that_was_asked_for():
    with batches(tiny()) as data:
        for step in (3, 0, 7, 7, 8):
            assert torch.equal(data.get(step)[0], scaling().inputs(Memory().pair(step)[0]))


def test_one_thread_reads_and_no_other_touches_the_source():
    threads = set()

    class Watched(Memory):
        def batch(self, index):
            threads.add(threading.current_thread().name)
            return super().batch(index)

    with batches(tiny(), source=Watched()) as data:
        for step in (0, 1, 5, 6):
            data.get(step)
    assert len(threads) == 1 and next(iter(threads)).startswith("batches")


def place(rank, size):
    """A rank that has all features, before any group is made."""
    return dataclasses.replace(alone(tiny().n_features), ranks=Ranks(rank, size, rank))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_a_batch(size):
    parts = []
    for rank in range(size):
        with batches(tiny(), place(rank, size)) as data:
            parts.append(data.get(2))
    with batches(tiny()) as data:
        for side, whole in zip(zip(*parts, strict=True), data.get(2), strict=True):
            assert torch.equal(torch.cat(side), whole)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(
        ConfigError, match=r"multiple of the number of ranks \(3\); found 32\n  where: train.batch_tokens"
    ):
        place(0, 3).rows(32)


def test_one_rank_gathers_its_own_rows():
    rows = torch.arange(6).reshape(3, 2)
    assert Group().gather_rows(rows) is rows


class Stored(Memory):
    """As a cache would hold them: eight bits a number, inputs alone if `alone`."""

    def __init__(self, *, alone=False):
        super().__init__()
        self.alone = alone
        self.codec = make_codec("int8", N_LAYERS, D_MODEL, 3)
        self.channels = Channels(torch.ones(N_LAYERS, D_MODEL), torch.full((N_LAYERS, D_MODEL), 2.0), torch.ones(2))

    def batch(self, index):
        sides = [Encoded(self.codec, self.channels, self.codec.encode(x, self.channels)) for x in self.pair(index)]
        return StoredBatch(sides[0], None if self.alone else sides[1])


def test_stored_numbers_are_restored():
    with batches(tiny(), source=Stored()) as data:
        found = data.get(1)
    for side, exact, scale in zip(found, Memory().pair(1), (scaling().inputs, scaling().outputs), strict=True):
        error = (side - scale(exact)).square().mean() / scale(exact).square().mean()
        assert 0 < error < 1e-4


def test_targets_are_computed_from_the_restored_inputs_before_scaling():
    asked = []

    def targets(x):
        asked.append(x)
        return x.flip(1) * 5

    with batches(tiny(), source=Stored(alone=True), targets=targets) as data:
        x, y = data.get(1)
    assert torch.equal(scaling().inputs(asked[0]), x)
    assert torch.equal(y, scaling().outputs(asked[0].flip(1) * 5))


def test_stored_outputs_are_taken_before_computed_ones():
    with batches(tiny(), targets=lambda x: x * float("nan")) as data:
        assert torch.isfinite(data.get(0)[1]).all()


def test_inputs_alone_without_targets_are_refused():
    with (
        pytest.raises(ShapeError, match=r"MLP outputs in the batch, or a function(.|\n)*targets=recomputed"),
        batches(tiny(), source=Stored(alone=True)) as data,
    ):
        data.get(0)


def test_what_the_trainer_does_to_a_batch_does_not_reach_the_source():
    x = torch.randn(4, N_LAYERS, D_MODEL)
    kept = plain_batch(x.clone(), x.clone())

    class Same:
        def batch(self, index):
            return kept

    with batches(tiny(), source=Same()) as data:
        data.get(0)[0].zero_()
        assert torch.equal(data.get(1)[0], scaling().inputs(x))


def test_an_error_of_the_source_arrives_and_the_thread_ends():
    class Broken:
        def batch(self, index):
            raise OSError(f"chunk of batch {index}")

    with pytest.raises(OSError, match="chunk of batch 0"), batches(tiny(), source=Broken()) as data:
        data.get(0)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
