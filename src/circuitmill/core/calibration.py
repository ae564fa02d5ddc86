"""From a sample of activations to the constants that codecs need: deviations, and what a step costs in bits."""

import torch
from jaxtyping import Float
from torch import Tensor

_CHANNEL_FLOOR = 0.25
"""Least scale of a channel, in units of the layer's median: a channel quiet in the sample that bursts later then costs
its group a few bits at that token instead of all of them."""
_ONE_SIGMA = 0.1587
"""Share of a normal distribution below minus one standard deviation."""
_COARSEST, _FINEST, _PER_OCTAVE = 3, -6, 4


def step_grid() -> Float[Tensor, " step"]:
    """Quantisation steps whose cost is measured, in standard deviations: 8 down to 1/64, four to the octave."""
    count = (_COARSEST - _FINEST) * _PER_OCTAVE + 1
    return torch.exp2(torch.linspace(_COARSEST, _FINEST, count))


def channel_constants(
    sample: Float[Tensor, "token layer d_model"],
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    """Center and scale of each channel: the median, and half the distance from the 16th to the 84th percentile.

    They are a normal channel's mean and standard deviation, and do not see a few massive activations. The scale is at
    least a quarter of the layer's median; 1 in a layer that never varies.
    """
    low, center, high = _quantiles(sample.to(torch.float32), (_ONE_SIGMA, 0.5, 1 - _ONE_SIGMA))
    spread = (high - low) / 2
    floor = _CHANNEL_FLOOR * spread.median(dim=1, keepdim=True).values
    scales = torch.maximum(spread, floor)
    # a layer in which more than half of the channels hardly ever vary
    deviation = sample.to(torch.float32).std(dim=0, correction=0).amax(dim=1, keepdim=True)
    scales = torch.where(scales > 0, scales, deviation)
    return center, torch.where(scales > 0, scales, torch.ones_like(scales))


def _quantiles(
    x: Float[Tensor, "token layer d_model"], shares: tuple[float, ...]
) -> tuple[Float[Tensor, "layer d_model"], ...]:
    """Quantiles over tokens, layer by layer: a sort of everything would hold it twice."""
    wanted = [round(share * (len(x) - 1)) for share in shares]
    ordered = torch.stack([x[:, layer].sort(dim=0).values[wanted] for layer in range(x.shape[1])], dim=1)
    return tuple(ordered)


def entropy_curve(u: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "layer step"]:
    """Bits per number, by Shannon's entropy, of round(u / step) for every step of the grid.

    Args:
        u: Standardised activations.
    """
    curve = torch.empty(u.shape[1], len(step_grid()))
    for layer in range(u.shape[1]):
        values = u[:, layer].flatten()
        for index, step in enumerate(step_grid().tolist()):
            codes = (values / step).round_().clamp_(-(2**15), 2**15).to(torch.int64)
            counts = torch.bincount(codes - codes.min()).to(torch.float64)
            shares = counts[counts > 0] / counts.sum()
            curve[layer, index] = -(shares * shares.log2()).sum()
    return curve


def step_for(bits: float, curve: Float[Tensor, "layer step"]) -> Float[Tensor, " layer"]:
    """The step of each layer at which a number costs so many bits, between points of the grid.

    Linear in log2(step); beyond the ends of the curve the nearest step of the grid.
    """
    exponents = step_grid().log2()
    steps = []
    for layer in curve:
        rising = layer.cummax(dim=0).values  # finer steps cost more, but for the noise of a small sample
        right = int(torch.searchsorted(rising, bits).clamp(1, len(rising) - 1))
        low, high = rising[right - 1], rising[right]
        share = ((bits - low) / (high - low)).clamp(0, 1) if high > low else torch.tensor(1.0)
        steps.append(exponents[right - 1] + share * (exponents[right] - exponents[right - 1]))
    return torch.exp2(torch.stack(steps))
