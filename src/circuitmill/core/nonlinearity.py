"""Nonlinearities between pre-activation and activation.

JumpReLU is discontinuous at its threshold, so the derivative of the expected loss by the threshold is estimated with a
rectangular kernel of width `bandwidth` (Rajamanoharan et al. 2024, "Jumping Ahead", section 3; straight-through):

    a = h * H(h - theta),   da/dh = H(h - theta),   da/dtheta = -(theta / bandwidth) * rect((h - theta) / bandwidth)

with rect(u) = 1 for |u| < 1/2. Because theta enters as an ordinary tensor, theta = exp(log_threshold) supplies the
further factor theta of the chain rule by itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class _JumpReLU(torch.autograd.Function):
    """JumpReLU with the straight-through derivative by the threshold (formula in the module's docstring)."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pre, threshold = ctx.saved_tensors
        by_pre = torch.where(pre > threshold, gradient, 0.0) if ctx.needs_input_grad[0] else None
        by_threshold = None
        if ctx.needs_input_grad[1]:
            near = (pre - threshold).abs() < ctx.bandwidth / 2
            # theta is the same for all tokens, so it leaves the sum over them
            by_threshold = torch.where(near, gradient, 0.0).sum_to_size(threshold.shape) * (-threshold / ctx.bandwidth)
        return by_pre, by_threshold, None


def jumprelu(
    pre: Float[Tensor, "token *layer feature"], threshold: Float[Tensor, "*layer feature"], bandwidth: float = 1.0
) -> Float[Tensor, "token *layer feature"]:
    """Keep a pre-activation where it exceeds its threshold, strictly; zero elsewhere.

    >>> jumprelu(torch.tensor([[0.5, 2.0, 1.0]]), torch.tensor([1.0, 1.0, 1.0]))
    tensor([[0., 2., 0.]])

    Args:
        bandwidth: Width of the kernel of the threshold's derivative, in units of the pre-activation. It has no effect
            on the value.
    """
    return _JumpReLU.apply(pre, threshold, bandwidth)
