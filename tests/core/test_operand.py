import pytest
import torch

from circuitmill.core.operand import Dense, Operand
from circuitmill.kernels.entries import places
from circuitmill.kernels.sparse import Sparse


@pytest.fixture
def a():
    torch.manual_seed(0)
    whole = torch.randn(6, 5, dtype=torch.float64).relu()
    whole[2] = 0  # a token on which nothing fires
    whole[:, 3] = 0  # and a feature that never does
    return whole.requires_grad_()


@pytest.fixture(params=["dense", "sparse", "sparse with zeros"])
def operand(request, a):
    if request.param == "dense":
        return Dense(a)
    kept = a.detach() > 0
    if request.param == "sparse with zeros":
        kept |= torch.rand(6, 5) < 0.3
    entries = places(kept)
    return Sparse(entries, entries.gather(a))


def same(ours, theirs, *parameters):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, parameters, upstream),
        torch.autograd.grad(theirs, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def at(kept, gradient):
    """The gradient at places that are kept: elsewhere a sparse operand has none."""
    return torch.where(kept, gradient, 0.0)


def test_is_an_operand(operand):
    assert isinstance(operand, Operand)
    assert (operand.n_tokens, operand.n_features) == (6, 5)


def test_product(operand, a):
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = operand.times(weight), a @ weight
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(6, 4, dtype=torch.float64)
    by_weight, by_a = torch.autograd.grad(ours, (weight, a), upstream)
    expected_weight, expected_a = torch.autograd.grad(theirs, (weight, a), upstream)
    torch.testing.assert_close(by_weight, expected_weight, rtol=0, atol=1e-12)
    fires = a > 0
    torch.testing.assert_close(at(fires, by_a), at(fires, expected_a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
def test_factors_and_offsets(operand, a, with_scale, with_offset):
    scale = torch.randn(5, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True)
    parameters = [one for one, used in ((scale, with_scale), (offset, with_offset)) if used]
    ours = operand.adjusted(scale if with_scale else None, offset if with_offset else None).dense()
    theirs = torch.zeros(6, 5, dtype=torch.float64)
    for token in range(6):
        for feature in range(5):
            if a[token, feature] > 0:
                value = a[token, feature] * (scale[feature] if with_scale else 1.0)
                theirs[token, feature] = value + (offset[feature] if with_offset else 0.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    if parameters:
        same(ours, theirs, *parameters)


@pytest.mark.parametrize("span", [slice(None), slice(0, 2), slice(1, 4), slice(3, 4), slice(4, 5)], ids=str)
def test_stretches_of_features(operand, a, span):
    part = operand.within(span)
    assert part.n_features == len(range(5)[span]) and part.n_tokens == 6
    torch.testing.assert_close(part.dense(), a[:, span], rtol=0, atol=0)
    weight = torch.randn(part.n_features, 3, dtype=torch.float64)
    torch.testing.assert_close(part.times(weight), a[:, span] @ weight, rtol=0, atol=1e-12)
    assert part.firings().tolist() == (a[:, span] > 0).sum(dim=0).tolist()


@pytest.mark.parametrize("function", [torch.tanh, torch.square, lambda value: value])
def test_totals(operand, a, function):
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    same(operand.total(function, weight), function(a * weight).sum(), weight)
    torch.testing.assert_close(operand.total(function), function(a).sum(), rtol=0, atol=1e-12)


def test_firings_count_tokens_above_zero(operand, a):
    assert operand.firings().tolist() == [sum(a[t, i].item() > 0 for t in range(6)) for i in range(5)]
    assert operand.firings()[3] == 0 and operand.firings().dtype == torch.int64
