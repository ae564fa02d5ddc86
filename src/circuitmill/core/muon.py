"""Muon: momentum whose direction is orthogonalised, for matrices and stacks of matrices.

torch.optim.Muon takes single matrices, and orthogonalises in bfloat16. Processors without bfloat16 arithmetic emulate
its products slowly: on one with AVX2 alone that took nine tenths of an update. On a CPU products are therefore taken in
float32 here and their results rounded to bfloat16, which is what such arithmetic does. The rounding is kept because it
matters: without it one training in which all else was equal passed the state of a two-hop question through attention
instead (docs/log.md).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


def _rounded(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bfloat16 where products of it are fast, else its numbers in float32."""
    return x.bfloat16() if x.is_cuda else x.bfloat16().float()


def orthogonalised(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """About U V^T of the singular value decomposition U S V^T, by five Newton-Schulz iterations.

    The quintic iteration and its coefficients are those of Jordan et al., "Muon: An optimizer for hidden layers in
    neural networks" (2024); singular values end between 0.7 and 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = _rounded(matrix.T if tall else matrix)
    x = _rounded(x / _rounded(x.norm()).clamp(min=_EPS))
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = _rounded(x @ x.T)
        x = _rounded(torch.addmm(x, _rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c)), x, beta=a))
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; steps as torch.optim.Muon's.

    Args:
        params: Matrices, or stacks of them with three axes, or groups of these. A group's `stack` is the axis along
            which its matrices are stacked, the first if it says nothing; each is orthogonalised by itself.
        lr: Learning rate.
        weight_decay: Share of a weight that is taken off per unit of learning rate.
        momentum: Decay of the mean gradient.
        match_adam: Multiply the rate by 0.2 sqrt(max(rows, columns)), with which numbers move about as far as Adam
            moves them, so that both can have one rate (Liu et al. 2025, "Muon is Scalable for LLM Training", section
            2.2); else by sqrt(rows / columns) for tall matrices.
    """

    def __init__(
        self, params: list, *, lr: float, weight_decay: float, momentum: float, match_adam: bool = False
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "stack": 0, "match_adam": match_adam}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        for own, slope, mean in zip(
            *(_matrices(whole, group["stack"]) for whole in (weight, gradient, state["momentum_buffer"])), strict=True
        ):
            direction = orthogonalised(slope.lerp(mean, group["momentum"]))
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(direction, alpha=-group["lr"] * _factor(*own.shape, match_adam=group["match_adam"]))


def _matrices(whole: Tensor, axis: int) -> list[Float[Tensor, "row column"]]:
    """Views of a stack's matrices."""
    return [whole] if whole.ndim == 2 else [whole.select(axis, index) for index in range(whole.shape[axis])]


def _factor(rows: int, columns: int, *, match_adam: bool) -> float:
    if match_adam:
        return 0.2 * math.sqrt(max(rows, columns))
    return max(1, rows / columns) ** 0.5
