import threading

import pytest
import torch
from tests.training.helpers import Memory, batches, scaling, tiny

from circuitmill.distributed import Ranks
from circuitmill.errors import ConfigError


def test_batches_are_scaled_and_read_one_ahead():
    source = Memory()
    with batches(tiny(), source=source) as data:
        x, y = data.get(4)
    assert source.asked[:1] == [4] and set(source.asked) <= {4, 5}
    raw_x, raw_y = Memory().batch(4)
    torch.testing.assert_close(x, scaling().inputs(raw_x))
    torch.testing.assert_close(y, scaling().outputs(raw_y))


def test_every_batch_is_read_once_in_a_row():
    source = Memory()
    with batches(tiny(), source=source) as data:
        for step in range(5):
            data.get(step)
    assert source.asked in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])


def test_ranks_share_a_batch():
    parts = []
    for rank in range(4):
        with batches(tiny(), Ranks(rank, 4, rank)) as data:
            parts.append(data.get(2)[0])
    with batches(tiny()) as data:
        torch.testing.assert_close(torch.cat(parts), data.get(2)[0], rtol=0, atol=0)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(
        ConfigError, match=r"multiple of the number of ranks \(3\); found 32\n  where: train.batch_tokens"
    ):
        batches(tiny(), Ranks(0, 3, 0))


def test_an_error_of_the_source_arrives_and_the_thread_ends():
    class Broken:
        def batch(self, index):
            raise OSError(f"chunk of batch {index}")

    with pytest.raises(OSError, match="chunk of batch 0"), batches(tiny(), source=Broken()) as data:
        data.get(0)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
