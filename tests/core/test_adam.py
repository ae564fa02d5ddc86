"""Adam in blocks of rows against torch's, in float64 and with few bits; features without a gradient."""

import copy
import math
from typing import Any

import pytest
import torch

from circuitmill.core import adam
from circuitmill.core.adam import RowAdam

FEW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
SHAPES = {None: (5, 3, 4), 0: (60, 3, 4), 1: (2, 30, 12)}
"""Of a parameter, by the axis along which it lists features."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that every parameter here has several."""
    monkeypatch.setitem(adam.BLOCK, "cpu", 52)


def parameter(axis: int | None, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Parameter:
    values = torch.randn(SHAPES[axis], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.Parameter(values.to(dtype))


def optimizer(weight: torch.nn.Parameter, axis: int | None, **options: Any) -> RowAdam:
    return RowAdam([{"params": [("W", weight)], "axis": axis}], **(FEW | options))


def gradient(axis: int | None, step: int, share: float = 1.0) -> torch.Tensor:
    """Sizes differ a lot between features; a share of the features has any."""
    generator = torch.Generator().manual_seed(1000 + step)
    values = torch.randn(SHAPES[axis], generator=generator, dtype=torch.float64)
    rows = SHAPES[axis][: (axis or 0) + 1]
    scale = 10.0 ** torch.linspace(-3, 1, math.prod(rows), dtype=torch.float64).view(rows)
    chosen = torch.rand(rows, generator=generator) < share
    return values * (scale * chosen).view(*rows, *[1] * (3 - len(rows)))


def rate(step: int) -> float:
    """Rises and falls."""
    return 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / 400)


def compared(axis: int | None, steps: int, share: float, **options: Any) -> tuple[RowAdam, torch.Tensor, torch.Tensor]:
    """Trained by rows, and by torch's dense Adam; the optimizer and both weights."""
    ours, theirs = parameter(axis), parameter(axis)
    inner = optimizer(ours, axis, **options)
    dense = torch.optim.AdamW([theirs], **(FEW | {"weight_decay": 0.0} | options))
    for step in range(steps):
        for one, weight in ((inner, ours), (dense, theirs)):
            one.param_groups[0]["lr"] = rate(step)
            weight.grad = gradient(axis, step, share)
            one.step()
    return inner, ours, theirs


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_with_a_gradient_everywhere_it_is_dense_adam(axis, weight_decay):
    inner, ours, theirs = compared(axis, 30, 1.0, weight_decay=weight_decay)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = inner.caught_up(ours, ours)
    assert found is None if axis is None else torch.equal(found, ours)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_features_that_catch_up_are_where_dense_adam_is(axis, weight_decay):
    inner, ours, theirs = compared(axis, 200, 0.05, weight_decay=weight_decay)
    before = ours.detach().clone()
    found = inner.caught_up(ours, ours)
    assert torch.equal(ours, before)
    moved = (theirs - parameter(axis)).abs().max()
    stale, caught = (ours - theirs).abs().max(), (found - theirs).abs().max()
    # the same but for eps, about 1e-4 of the smallest root mean squares; without catching up it is not
    assert caught < 1e-3 * moved and stale > 1e-2 * moved


def test_without_eps_what_was_missed_is_exact():
    _, _, theirs = compared(0, 200, 0.05, eps=1e-30)
    inner, ours, _ = compared(0, 200, 0.05, eps=1e-30)
    torch.testing.assert_close(inner.caught_up(ours, ours), theirs.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_the_deviation_by_eps_is_within_its_bound(size):
    """One gradient, then none: the movement after k steps is too large by the share eps beta2^(-k/2) / sqrt(v)."""
    ours, theirs = parameter(0), parameter(0)
    inner, dense = optimizer(ours, 0), torch.optim.Adam([theirs], **FEW)
    start = ours.detach().clone()
    first, bound = None, torch.zeros(())
    r, corrections = 0.9 / 0.99**0.5, []
    for step in range(1, 61):
        for one, weight in ((inner, ours), (dense, theirs)):
            weight.grad = torch.full_like(weight, size if step == 1 else 0.0)
            one.step()
        if step == 1:
            first = (theirs - start).detach().abs()
            continue
        corrections.append(math.sqrt(1 - 0.99**step) / (1 - 0.9**step))
        movement = 1e-2 * corrections[-1] * r ** (step - 1) * 0.1 / 0.1
        bound = bound + movement * 1e-8 * 0.99 ** (-(step - 1) / 2) / (0.1 * size)
    found = inner.caught_up(ours, ours)
    assert torch.equal(ours, start - (start - ours)) and (ours - start).abs().max() == first.max()
    deviation = (found - theirs).abs().max()
    assert 0 < deviation <= bound
    # and the row itself was out of date by no more than the sum of the series
    assert (ours - found).abs().max() <= 1e-2 * max(corrections) * r / (1 - r)


def test_features_without_a_gradient_are_not_touched():
    weight = parameter(1)
    inner = optimizer(weight, 1, weight_decay=0.1)
    for step in range(3):
        weight.grad = gradient(1, step)
        inner.step()
    before = {"W": weight.detach().clone()} | copy.deepcopy(dict(inner.state[weight]))
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 7, 11] = 1e-20
    inner.step()
    changed = torch.zeros(2, 30, dtype=torch.bool)
    changed[1, 7] = True
    for old, new in (
        (before["W"], weight),
        *((before[key], inner.state[weight][key]) for key in ("exp_avg", "exp_avg_sq")),
    ):
        assert torch.equal((old != new).flatten(2).any(dim=2), changed)
    assert torch.equal(inner.state[weight]["row_step"], 3 + changed.int())


@pytest.mark.parametrize("axis", SHAPES)
def test_gradients_are_scaled_as_they_are_read(axis):
    ours, theirs = parameter(axis), parameter(axis)
    inner, other = optimizer(ours, axis), optimizer(theirs, axis)
    inner.factor = 0.25
    for step in range(3):
        ours.grad, theirs.grad = gradient(axis, step), gradient(axis, step) * 0.25
        inner.step()
        other.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_every_update_in_few_bits_is_to_a_neighbour_of_the_exact_one(axis, weights, moments):
    ours = parameter(axis, weights)
    inner = optimizer(ours, axis, moments=moments)
    for step in range(20):
        exact = torch.nn.Parameter(ours.detach().double())
        dense = torch.optim.Adam([exact], **FEW)
        if step:
            old = inner.state[ours]
            moments_before = {key: old[key].double() for key in ("exp_avg", "exp_avg_sq")}
            dense.state[exact] = {"step": old["step"].clone(), **moments_before}
        exact.grad = gradient(axis, step)
        ours.grad = exact.grad.to(weights)
        exact.grad = ours.grad.double()
        inner.step()
        dense.step()
        new, expected = inner.state[ours], dense.state[exact]
        assert (ours.dtype, new["exp_avg"].dtype, new["exp_avg_sq"].dtype) == (weights, moments, moments)
        for found, value, dtype in (
            (ours, exact, weights),
            (new["exp_avg"], expected["exp_avg"], moments),
            (new["exp_avg_sq"], expected["exp_avg_sq"], moments),
        ):
            # a neighbour is less than one spacing of the type away: 2^-7 of the number in bfloat16
            spacing = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
            assert ((found.double() - value).abs() <= spacing * value.abs() + 1e-7).all()


def test_moments_below_the_spacing_of_numbers_add_up(monkeypatch):
    """beta2 0.999: a step of the mean square is less than half the spacing of bfloat16 numbers."""
    monkeypatch.setitem(adam.BLOCK, "cpu", 1 << 16)
    weight = torch.nn.Parameter(torch.zeros(1, 500, 40))
    inner = optimizer(weight, None, betas=(0.9, 0.999), moments=torch.bfloat16, lr=0.0)
    for size, count in ((1.0, 1000), (1.02, 500)):
        for _ in range(count):
            weight.grad = torch.full_like(weight, size)
            inner.step()
    expected = (1 - 0.999**1000) * 0.999**500 + 1.02**2 * (1 - 0.999**500)
    assert inner.state[weight]["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("axis", SHAPES)
def test_rounding_follows_seed_name_and_step(axis):
    def trained(seed: str, name: str) -> torch.Tensor:
        weight = parameter(axis, torch.bfloat16)
        inner = RowAdam([{"params": [(name, weight)], "axis": axis}], seed=seed, **FEW)
        for step in range(3):
            weight.grad = gradient(axis, step).bfloat16()
            inner.step()
        return weight.detach()

    assert torch.equal(trained("1", "W"), trained("1", "W"))
    assert not torch.equal(trained("1", "W"), trained("2", "W"))
    assert not torch.equal(trained("1", "W"), trained("1", "V"))


def test_parameters_without_a_gradient_are_left_out():
    weight = parameter(0)
    inner = optimizer(weight, 0)
    before = weight.detach().clone()
    inner.step()
    assert torch.equal(weight, before) and not inner.state[weight] and inner.caught_up(weight, weight) is None
