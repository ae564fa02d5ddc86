"""The fast operators against the slow ones, and as torch sees them."""

import pytest
import torch

from circuitmill.kernels import cpu, operators, reference
from circuitmill.kernels.entries import Entries, from_places, places, true_places
from circuitmill.kernels.select import candidates, lower_bound

SHAPES = {
    "usual": (9, 13, 6, 0.3),
    "nothing kept": (4, 5, 3, 0.0),
    "all kept": (4, 5, 3, 1.0),
    "one token": (1, 40, 3, 0.2),
    "one feature": (7, 1, 2, 0.5),
    "one column": (6, 17, 1, 0.4),
}


def drawn(name: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Entries, torch.Tensor, torch.Tensor]:
    """Values, entries, weight by feature, rows by token; a row without entries, one with all, a frequent feature."""
    tokens, features, columns, share = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    kept = torch.rand(tokens, features, generator=generator) < share
    if name == "usual":
        kept[2], kept[5], kept[:, 4] = False, True, True
    entries = places(kept)
    values = torch.randn(len(entries), generator=generator, dtype=torch.float64)
    weight = torch.randn(features, columns, generator=generator, dtype=torch.float64)
    rows = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return values.to(dtype), entries, weight.to(dtype), rows.to(dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_cpu_equals_the_reference(name):
    values, entries, weight, rows = drawn(name)
    own = entries.by_feature
    pairs = [
        (module.decode(values, entries.feature, entries.offsets, weight) for module in (cpu, reference)),
        (module.dots(rows, weight, entries.feature, entries.token) for module in (cpu, reference)),
        (
            module.segments(values[own.order], rows, own.token, own.offsets, torch.float64)
            for module in (cpu, reference)
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_the_dense_product(name):
    values, entries, weight, rows = drawn(name)
    whole = torch.zeros(entries.n_tokens, entries.n_features, dtype=torch.float64)
    whole[entries.token, entries.feature] = values
    own = entries.by_feature
    for ours, theirs in (
        (reference.decode(values, entries.feature, entries.offsets, weight), whole @ weight),
        (reference.dots(rows, weight, entries.feature, entries.token), entries.gather(rows @ weight.T)),
        (reference.segments(values[own.order], rows, own.token, own.offsets, torch.float64), whole.T @ rows),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_derivatives(name):
    values, entries, weight, rows = drawn(name)
    values, weight, rows = (each.requires_grad_() for each in (values, weight, rows))
    assert torch.autograd.gradcheck(lambda v, w: operators.decode(v, entries, w), (values, weight))
    assert torch.autograd.gradcheck(lambda r, w: operators.dots(r, entries, w), (rows, weight))


@pytest.mark.parametrize("operator", ["decode", "dots"])
def test_torch_accepts_the_registration(operator):
    values, entries, weight, rows = drawn("usual")
    own = entries.by_feature
    first = values if operator == "decode" else rows
    places_ = (entries.feature, entries.offsets, entries.token, own.order, own.token, own.offsets)
    registered = getattr(torch.ops.circuitmill, operator).default
    torch.library.opcheck(registered, (first.requires_grad_(), weight.requires_grad_(), *places_))


@pytest.mark.parametrize("shape", [(7, 13, 5), (1, 9, 3), (6, 1, 2)])
@pytest.mark.parametrize("level", [-9.0, 0.5, 9.0])
def test_places_above_floors(shape, level):
    tokens, features, width = shape
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (tokens, features))
    bias, floor = (torch.randn(features, generator=generator, dtype=torch.float64) for _ in range(2))
    row_floor = torch.randn(tokens, generator=generator, dtype=torch.float64).add(-1)
    found = {}
    for most in (tokens * features, 0):
        given = (x, weight, bias, floor + level, row_floor, most)
        ours, theirs = cpu.above(*given), reference.above(*given)
        assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
        torch.library.opcheck(torch.ops.circuitmill.above.default, given)
        found[most] = ours
    assert found[0][1].tolist() == found[tokens * features][1].tolist() and len(found[0][0]) == 0
    feature, offsets = operators.above(x, weight, bias, floor, tokens * features)
    entries = Entries(feature, offsets, features)
    assert torch.stack([entries.token, feature]).tolist() == (x @ weight.T + bias > floor).nonzero().T.tolist()


def test_weights_in_fewer_bits_are_summed_in_float32():
    values, entries, weight, rows = drawn("usual", torch.float32)
    small = weight.bfloat16().requires_grad_()
    ours = operators.decode(values, entries, small)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, operators.decode(values, entries, small.float()), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(ours, small, rows)
    own = entries.by_feature
    exact = reference.segments(values[own.order], rows, own.token, own.offsets, torch.float32)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, exact.bfloat16(), rtol=2**-8, atol=1e-6)


def test_places_are_numbered_row_by_row():
    kept = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    entries = places(kept)
    assert entries.token.tolist() == [0, 0, 2] and entries.feature.tolist() == [1, 2, 0]
    assert entries.offsets.tolist() == [0, 2, 2, 3]
    assert (entries.n_tokens, entries.n_features, len(entries)) == (3, 3, 3)
    own = entries.by_feature
    assert own.order.tolist() == [2, 0, 1] and own.token.tolist() == [2, 0, 0] and own.offsets.tolist() == [0, 1, 2, 3]
    some = entries.kept(torch.tensor([True, False, True]))
    assert some.token.tolist() == [0, 2] and some.offsets.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1003])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_true_places(size, share):
    torch.manual_seed(size)
    kept = torch.rand(size) < share
    assert torch.equal(true_places(kept), kept.nonzero().flatten())
    shifted = torch.cat([torch.zeros(3, dtype=torch.bool), kept])[3:]
    assert torch.equal(true_places(shifted), kept.nonzero().flatten())


@pytest.mark.parametrize("k", [1, 2, 5, 40, 41, 99])
@pytest.mark.parametrize("shape", [(7, 41), (1, 333), (3, 1)])
def test_candidates_hold_the_largest_and_all_that_equal_the_last(k, shape):
    torch.manual_seed(k)
    for values in (torch.randn(shape), torch.randint(-3, 4, shape).float()):
        found = candidates(values, k)
        mask = torch.zeros(shape, dtype=torch.bool).flatten().index_fill(0, found, value=True).view(shape)
        assert found.tolist() == sorted(found.tolist()) and not mask[values <= 0].any()
        least = values.sort(dim=1, descending=True).values[:, min(k, shape[1]) - 1 : min(k, shape[1])]
        assert mask[(values >= least) & (values > 0)].all()
        assert (lower_bound(values, k) <= least).all()


def test_candidates_are_few():
    torch.manual_seed(0)
    values = torch.randn(50, 4096)
    assert 16 * 50 <= len(candidates(values, 16)) < 1.3 * 16 * 50
    assert len(candidates(values.view(1, -1), 800)) < 1.3 * 800


def test_entries_from_places_without_any():
    none = torch.zeros(0, dtype=torch.int64)
    entries = from_places(none, none, 3, 4)
    assert entries.offsets.tolist() == [0, 0, 0, 0] and len(entries.token) == 0
    assert not operators.decode(torch.zeros(0), entries, torch.ones(4, 2)).any()


def test_the_same_input_gives_the_same_bits():
    values, entries, weight, rows = drawn("usual", torch.float32)
    values.requires_grad_()
    weight.requires_grad_()
    first, second = (
        torch.autograd.grad(operators.decode(values, entries, weight), (values, weight), rows) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
