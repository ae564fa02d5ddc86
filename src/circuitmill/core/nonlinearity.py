"""Nonlinearities between pre-activation and activation.

JumpReLU is discontinuous at its threshold theta, so the derivative of the expected loss by theta is estimated
with a rectangular kernel (Rajamanoharan et al. 2024, "Jumping Ahead", section 3; a straight-through estimator):

    a = h * H(h - theta),   da/dh = H(h - theta),   da/dtheta = -(theta / bandwidth) * rect((h - theta) / bandwidth)

with rect(u) = 1 for |u| < 1/2. The trained parameter is t = log(theta). The chain rule gives da/dt = da/dtheta * theta;
one reading of "Circuits Updates, January 2025" hands da/dtheta to t directly. `derivative` names the choice.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Derivative = Literal["chain", "direct"]


class _JumpReLU(torch.autograd.Function):
    """JumpReLU of the log-threshold with the straight-through derivative of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, log_threshold: Tensor, bandwidth: float, derivative: Derivative) -> Tensor:
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.derivative = bandwidth, derivative
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pre, threshold = ctx.saved_tensors
        by_pre = torch.where(pre > threshold, gradient, 0.0) if ctx.needs_input_grad[0] else None
        by_log_threshold = None
        if ctx.needs_input_grad[1]:
            near = (pre - threshold).abs_() < ctx.bandwidth / 2
            # theta is the same for all tokens, so it can wait until after the sum over them
            factor = threshold.square() if ctx.derivative == "chain" else threshold
            by_log_threshold = torch.where(near, gradient, 0.0).sum_to_size(threshold.shape) * (-factor / ctx.bandwidth)
        return by_pre, by_log_threshold, None, None


def jumprelu(
    pre: Float[Tensor, "*token feature"],
    log_threshold: Float[Tensor, "*layer feature"],
    bandwidth: float = 1.0,
    derivative: Derivative = "chain",
) -> Float[Tensor, "*token feature"]:
    """Keep a pre-activation where it exceeds its threshold, strictly; zero elsewhere.

    >>> jumprelu(torch.tensor([[0.5, 2.0, 1.0]]), torch.zeros(3))
    tensor([[0., 2., 0.]])

    Args:
        pre: For one layer, for all, or for chosen entries with one threshold each.
        log_threshold: Same trailing axes as `pre`.
        bandwidth: Width of the kernel of the threshold's derivative, in units of the pre-activation. It has
        no effect
            on the value.
        derivative: What reaches the log-threshold: "chain" is the true chain rule, "direct" leaves out one
        factor
            theta.
    """
    return _JumpReLU.apply(pre, log_threshold, bandwidth, derivative)
