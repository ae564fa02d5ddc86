"""Lengths of many vectors, with a derivative that reads each of them once."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Lengths(torch.autograd.Function):
    """Euclidean norm of every row; the gradient is the row, scaled by one number."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(rows, dim=1)
        ctx.save_for_backward(rows, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows, found = ctx.saved_tensors
        factor = torch.where(found > 0, gradient / torch.where(found > 0, found, 1.0), 0.0)
        return rows * factor[:, None]


def lengths(rows: Float[Tensor, "row column"]) -> Float[Tensor, " row"]:
    """Length of each row; the derivative of a length of zero is zero.

    >>> lengths(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    return _Lengths.apply(rows)


def root(square: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Square root whose derivative at zero is zero, as that of a length."""
    positive = square > 0
    return torch.where(positive, square, 1.0).sqrt() * positive
