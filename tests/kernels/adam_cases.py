"""Adam's update in plain PyTorch, and comparisons of the Triton kernel with it."""

import torch
from tests.kernels.kernel_cases import random_like

from circuitmill.kernels.adam import adam_

OPTIONS = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3, "factor": 0.7}


def adam_reference(weight, gradient, first, second, *, lr, beta1, beta2, eps, weight_decay, factor, step):
    """New weight and moments, in the type of the arguments."""
    gradient = factor * gradient
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    size = (second / (1 - beta2**step)).sqrt() + eps
    return (1 - lr * weight_decay) * weight - lr * first / (1 - beta1**step) / size, first, second


def state(shape, dtypes, device):
    """Weight, gradient and moments."""
    weight, gradient, first, second = (
        random_like(shape, dtype, seed, device) for seed, dtype in enumerate(dtypes, start=1)
    )
    return weight, gradient, first, second.abs()


def check_adam(shape, dtypes, block, device="cpu", bound=1e-12):
    """Several steps of numbers that are not rounded stochastically."""
    weight, gradient, *moments = state(shape, dtypes, device)
    wanted = [tensor.double() for tensor in (weight, *moments)]
    for step in range(1, 4):
        wanted = adam_reference(wanted[0], gradient.double(), *wanted[1:], **OPTIONS, step=step)
        sums = adam_(weight, gradient, *moments, **OPTIONS, step=step, seed=0, block=block)
        for found, exact in zip((weight, *moments), wanted, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)
        assert (sums is None) == (block == 0)
        if sums is not None:
            exact = weight.double().unflatten(1, (-1, block)).square().sum(dim=2)
            assert sums.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(sums.double(), exact, rtol=bound, atol=0.0)


def check_rounding(dtypes, device="cpu", shape=(64, 256), block=32):
    """What is stored in bfloat16 is a neighbour of the exact number, and on average the number."""
    weight, gradient, *moments = state(shape, dtypes, device)
    before = [tensor.double() for tensor in (weight, *moments)]
    exact = adam_reference(before[0], gradient.double(), *before[1:], **OPTIONS, step=3)
    sums = adam_(weight, gradient, *moments, **OPTIONS, step=3, seed=11, block=block)
    for found, wanted in zip((weight, *moments), exact, strict=True):
        wanted = wanted.flatten()
        error = found.double().flatten() - wanted
        if found.dtype != torch.bfloat16:
            assert error.abs().max() < 1e-5
            continue
        unit = 2.0 ** (wanted.abs().log2().floor() - 7)
        # arithmetic in float32 leaves errors of its own, also where numbers of size 1 cancel
        assert (error.abs() <= unit * (1 + 1e-4) + 1e-6).all()
        assert (error.abs() > unit / 2).float().mean() > 0.1, "rounded to the nearest"
        # an error has at most half a unit of standard deviation
        assert error.mean().abs() < 5 * (unit.square().sum() / 4).sqrt() / len(unit)
    stored = weight.double().unflatten(1, (-1, block)).square().sum(dim=2)
    torch.testing.assert_close(sums.double(), stored, rtol=1e-6, atol=0.0)


def check_noise(device="cpu"):
    """The same seed and step round alike; others do not, nor do weight, moments and neighbouring numbers."""

    def rounded(seed, step, shape=(32, 64), block=16):
        # all three numbers end about halfway between two neighbours
        weight, first, second = (
            torch.full(shape, value, dtype=torch.bfloat16, device=device) for value in (1.0, 1.0, 1.0 + 2.0**-7)
        )
        gradient = torch.full(shape, 1.0 + 2.0**-7, device=device)
        options = {"lr": 2.0**-9, "beta1": 0.5, "beta2": 0.5, "eps": 0.0, "weight_decay": 0.0, "factor": 1.0}
        adam_(weight, gradient, first, second, **options, step=step, seed=seed, block=block)
        return [(part.float() > part.float().mean()).double().flatten() for part in (weight, first, second)]

    once, again, wide = rounded(3, 40), rounded(3, 40), rounded(5, 40, (1, 2048), 2048)
    assert all(torch.equal(here, there) for here, there in zip(once, again, strict=True))
    draws = [*once, rounded(4, 40)[0], rounded(2**40 + 3, 40)[0], rounded(3, 41)[0]]
    draws += [once[0].roll(distance) for distance in (1, 4, 16, 64)]
    draws += [wide[0][:1024].repeat(2), wide[0][1024:].repeat(2)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws), dtype=torch.float64, device=device)
    # of 1,024 independent draws a correlation has a standard deviation of 0.031
    assert correlations.abs().max() < 0.16


def check_not_finite(device="cpu"):
    """What is not a number stays so when it is rounded, and infinity too."""
    weight = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
    moments = [torch.zeros(4, 64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    gradient = torch.ones(4, 64, device=device)
    weight[0], weight[1] = torch.nan, torch.inf
    # the patterns that GPUs and CPUs return for invalid arithmetic; any carry turns the first into -0
    gradient.view(torch.int32)[2] = 0x7FFFFFFF
    gradient.view(torch.int32)[3] = -0x400000
    adam_(weight, gradient, *moments, **OPTIONS, step=1, seed=0)
    assert weight[0].isnan().all() and weight[1].isposinf().all()
    for part in (weight, *moments):
        assert part[2:].isnan().all()
