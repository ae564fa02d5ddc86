"""Adam's kernel in Triton's interpreter, on a CPU; started by `test_adam.py` in a process of its own."""

import pytest
import torch
from tests.kernels.adam_cases import (
    OPTIONS,
    adam_reference,
    check_adam,
    check_noise,
    check_not_finite,
    check_rounding,
    state,
)

from circuitmill.errors import ShapeError
from circuitmill.kernels.adam import adam_

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = [(1, 1, 1), (1, 24, 24), (13, 35, 7), (13, 35, 35), (3, 2100, 1050), (5, 1100, 0), (9, 6, 1), (4, 9, 0)]


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_steps_equal_the_formula(rows, columns, block):
    check_adam((rows, columns), [F64] * 4, block)
    check_adam((rows, columns), [F32] * 4, block, bound=2e-6)
    check_adam((rows, columns), [F32, BF16, F32, F32], block, bound=2e-6)


def test_the_formula_is_that_of_torch():
    weight, _, first, second = state((3, 4), [F64] * 4, "cpu")
    first, second = first * 0, second * 0
    parameter = torch.nn.Parameter(weight.clone())
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    torchs = torch.optim.AdamW([parameter], OPTIONS["lr"], betas, OPTIONS["eps"], OPTIONS["weight_decay"])
    for step in (1, 2, 3):
        gradient = torch.randn(3, 4, dtype=F64)
        parameter.grad = gradient * OPTIONS["factor"]
        torchs.step()
        weight, first, second = adam_reference(weight, gradient, first, second, **OPTIONS, step=step)
        torch.testing.assert_close(weight, parameter.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32, F32), (F32, F32, BF16, BF16), (BF16,) * 4], ids=str)
def test_rounding(dtypes):
    check_rounding(dtypes)


def test_noise():
    check_noise()


def test_what_is_not_finite():
    check_not_finite()


def test_gradients_may_lie_in_any_order():
    weight, gradient, *moments = state((5, 6), [F64] * 4, "cpu")
    exact = adam_reference(weight, gradient, *moments, **OPTIONS, step=1)
    adam_(weight, gradient.T.contiguous().T, *moments, **OPTIONS, step=1, seed=0)
    torch.testing.assert_close(weight, exact[0], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_updated_in_one_pass_is_refused():
    weight, gradient, *moments = state((5, 6), [F32] * 4, "cpu")
    with pytest.raises(ShapeError, match="whole blocks of 4"):
        adam_(weight, gradient, *moments, **OPTIONS, step=1, seed=0, block=4)
    with pytest.raises(ShapeError, match="contiguous"):
        adam_(weight[:, ::2], gradient[:, ::2], *(part[:, ::2] for part in moments), **OPTIONS, step=1, seed=0)
