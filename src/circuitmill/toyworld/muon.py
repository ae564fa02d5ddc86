"""Muon, with the bfloat16 of its iteration made from float32.

torch.optim.Muon orthogonalises in bfloat16. Processors without bfloat16 arithmetic emulate its products slowly: on one
with AVX2 alone that took nine tenths of an update. Here products are taken in float32 and their results rounded to
bfloat16, which is what such arithmetic does. The rounding is kept because it matters: without it one training in which
all else was equal passed the state of a two-hop question through attention instead (docs/log.md).
"""

import torch
from jaxtyping import Float
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


def _rounded(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.bfloat16().float()


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
        params: Matrices, or groups of them.
        lr: Learning rate; multiplied by sqrt(rows / columns) for tall matrices.
        weight_decay: Share of a weight that is taken off per unit of learning rate.
        momentum: Decay of the mean gradient.
    """

    def __init__(self, params: list, *, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

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
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalised(gradient.lerp(mean, group["momentum"]))
        rows, columns = weight.shape
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
