"""Batches of what is read and reconstructed alike."""

import pytest
import torch
from tests.training.helpers import D_MODEL, N_LAYERS, Memory

from circuitmill.core.codecs import Channels, Codec, Encoded, StoredBatch
from circuitmill.core.scaling import Scaling
from circuitmill.errors import ShapeError
from circuitmill.training.batches import Batches

CPU = torch.device("cpu")


class Alone(Memory):
    """Inputs alone."""

    def batch(self, index: int) -> StoredBatch:
        codec, neutral = Codec("float32", N_LAYERS, D_MODEL), Channels.neutral(N_LAYERS, D_MODEL)
        return StoredBatch(Encoded(codec, neutral, {"values": self.pair(index)[0]}), None)


def scaling() -> Scaling:
    """That of a cache of inputs alone, whose two sides are the same."""
    factors = torch.tensor([0.5, 2.0])
    return Scaling.by_layer(factors, factors, D_MODEL)


def test_what_is_read_is_what_is_reconstructed() -> None:
    with Batches(Alone(), scaling(), device=CPU, reproduces=True) as data:
        x, y = data.get(3)
    assert torch.equal(x, scaling().inputs(Alone().pair(3)[0]))
    assert torch.equal(x, y)
    x.zero_()
    assert y.abs().sum() > 0


def test_contradictions_are_refused() -> None:
    both = Batches(Memory(), scaling(), device=CPU, reproduces=True)
    with both as data, pytest.raises(ShapeError, match="are to be reconstructed; found outputs in the batch"):
        data.get(0)
    with pytest.raises(ShapeError, match="found a function that computes others"):
        Batches(Alone(), scaling(), device=CPU, reproduces=True, targets=lambda x: x)
    neither = Batches(Alone(), scaling(), device=CPU)
    with neither as data, pytest.raises(ShapeError, match=r"found neither(.|\n)*reproduces for .* targets=inputs"):
        data.get(0)
