"""The sparse kernels in Triton's interpreter, on a CPU; started by `test_fused.py` in a process of its own."""

import pytest
import torch
from tests.kernels.kernel_cases import (
    SHAPES,
    TYPES,
    check_above,
    check_above_limits,
    check_decode,
    check_dots,
    check_segments,
)

from circuitmill.kernels import encode, fused

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
types = pytest.mark.parametrize(("one", "other"), TYPES, ids=str)


@shapes
@types
def test_decode(shape, one, other):
    check_decode(fused, shape, one, other)


def test_decode_adds_a_feature_as_often_as_it_is_listed():
    check_decode(fused, SHAPES["one entry per token"], torch.float64, torch.float64, repeated=True)


@shapes
@types
def test_dots(shape, one, other):
    check_dots(fused, shape, one, other)


def test_dots_of_entries_in_any_order():
    check_dots(fused, SHAPES["one entry per token"], torch.float64, torch.float64, shuffled=True)


@shapes
@types
def test_segments(shape, one, other):
    check_segments(fused, shape, one, one, other)


@pytest.mark.parametrize("piece", [1, 4])
@pytest.mark.parametrize("name", ["one of everything", "one token", "one entry per token"])
def test_segments_of_several_pieces(name, piece, monkeypatch):
    monkeypatch.setattr(fused, "PIECE", piece)
    check_segments(fused, SHAPES[name], torch.float64, torch.float64, torch.float64)
    check_segments(fused, SHAPES[name], torch.float32, torch.bfloat16, torch.bfloat16)


def test_matrices_that_are_not_stored_row_by_row():
    values, feature = torch.ones(1, dtype=torch.float64).expand(3), torch.tensor([0, 2, 1])
    offsets, weight = torch.tensor([0, 2, 3]), torch.arange(12, dtype=torch.float64).view(4, 3).T
    assert torch.equal(fused.decode(values, feature, offsets, weight), torch.stack([weight[0] + weight[2], weight[1]]))
    everywhere = torch.ones(1, dtype=torch.float64).expand(2, 4)
    assert torch.equal(fused.dots(everywhere, weight, feature, torch.tensor([0, 0, 1])), weight.sum(dim=1)[feature])


@shapes
@pytest.mark.parametrize(("one", "other"), [*TYPES, (torch.float16, torch.float16)], ids=str)
def test_above(shape, one, other, monkeypatch):
    """The interpreter multiplies the bit patterns of two bfloat16; float16 takes the tiles of the same size."""
    whole = check_above(encode, shape, one, other)
    monkeypatch.setattr(encode, "PLACES", 3 * shape[1])
    in_parts = check_above(encode, shape, one, other)
    assert all(torch.equal(here, there) for here, there in zip(whole, in_parts, strict=True))


def test_above_is_limited():
    check_above_limits(encode)


def test_no_tokens():
    none = torch.zeros(0, 3)
    weight, zeros = torch.ones(4, 3), torch.zeros(4)
    feature, offsets = encode.above(none, weight, zeros, zeros, torch.zeros(0), 10)
    assert feature.shape == (0,) and offsets.tolist() == [0]
    empty = torch.zeros(0, dtype=torch.int64)
    assert fused.decode(torch.zeros(0), empty, torch.zeros(1, dtype=torch.int64), weight).shape == (0, 3)
    assert fused.dots(none, weight, empty, empty).shape == (0,)
    assert torch.equal(
        fused.segments(torch.zeros(0), none, empty, torch.zeros(5, dtype=torch.int64), torch.float32), torch.zeros(4, 3)
    )
