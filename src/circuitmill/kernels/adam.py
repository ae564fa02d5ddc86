"""Adam's update of a matrix in one pass, on a GPU and in Triton.

Weight, gradient and both moments are read once and written once, and what the next step wants to know about the new
weights, the size of what each feature writes to each target, is added up on the way.
"""

# ruff: noqa: ANN001, ANN202
# what a kernel is given and returns are pointers, numbers and tiles of Triton's own

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from circuitmill.errors import ShapeError

_TILE = 1024
"""Numbers that a program updates at a time: 8 for each of its 128 threads."""
_WIDTH = 1024
"""Numbers that are updated in a row if no sums are asked for."""


# the type checker of the tests must not stand between Triton and a kernel's source, hence no_type_check
@triton.jit
@no_type_check
def _noise(seed, step, group, STREAM: tl.constexpr):
    """Random words of 32 bits, four for each group, as four consecutive columns of the group's row.

    Philox with ten rounds (Salmon et al. 2011); its counter is the group's number, the step and the stream.
    """
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + step, zero + STREAM)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
@no_type_check
def _rounded(value, noise):
    """A neighbour of each number in bfloat16, the nearer the likelier, and in float32 all the same.

    A bfloat16 is the upper half of a float32; 16 random bits carry over into it with the probability that the lower
    half stands for. What is not a number could turn into one.
    """
    bits = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
    return tl.where(value == value, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), value)


@triton.jit(do_not_specialize=["seed", "step"])
@no_type_check
def _update(
    weight,
    gradient,
    first,
    second,
    sums,
    scalars,
    n_spans,
    n_numbers,
    width,
    seed,
    step,
    TYPE: tl.constexpr,
    SPANS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update some spans of consecutive numbers and, unless `sums` is None, add up the squares of each."""
    span = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    factor, beta1, beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    keep, rate, correction, eps = (
        tl.load(scalars + 3),
        tl.load(scalars + 4),
        tl.load(scalars + 5),
        tl.load(scalars + 6),
    )
    total = tl.zeros((SPANS, COLUMNS), TYPE)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        place = span[:, None] * width + column[None, :]
        some = (span < n_spans)[:, None] & (column < width)[None, :] & (place < n_numbers)
        w = tl.load(weight + place, mask=some, other=0.0).to(TYPE) * keep.to(TYPE)
        g = tl.load(gradient + place, mask=some, other=0.0).to(TYPE) * factor.to(TYPE)
        m = tl.load(first + place, mask=some, other=0.0).to(TYPE)
        v = tl.load(second + place, mask=some, other=0.0).to(TYPE)
        m += (1 - beta1).to(TYPE) * (g - m)
        v += (1 - beta2).to(TYPE) * (g * g - v)
        w -= rate.to(TYPE) * m / (tl.sqrt(v) * correction.to(TYPE) + eps.to(TYPE))
        # four numbers share one draw; every draw of a parameter in a step has a number of its own
        group = span[:, None] * tl.cdiv(width, 4) + (begin // 4 + tl.arange(0, COLUMNS // 4))[None, :]
        if weight.dtype.element_ty == tl.bfloat16:
            w = _rounded(w, _noise(seed, step, group, 0))
        if first.dtype.element_ty == tl.bfloat16:
            m = _rounded(m, _noise(seed, step, group, 1))
        if second.dtype.element_ty == tl.bfloat16:
            v = _rounded(v, _noise(seed, step, group, 1) >> 16)
        tl.store(weight + place, w.to(weight.dtype.element_ty), mask=some)
        tl.store(first + place, m.to(first.dtype.element_ty), mask=some)
        tl.store(second + place, v.to(second.dtype.element_ty), mask=some)
        if sums is not None:
            total += tl.where(some, w * w, 0.0)
    if sums is not None:
        tl.store(sums + span, tl.sum(total, axis=1), mask=span < n_spans)


def adam_(
    weight: Float[Tensor, "row column"],
    gradient: Float[Tensor, "row column"],
    first: Float[Tensor, "row column"],
    second: Float[Tensor, "row column"],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: float,
    step: int,
    seed: int,
    block: int = 0,
) -> Float[Tensor, "row target"] | None:
    """Update a weight and its moments in place, as torch.optim.AdamW does.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  g = factor * gradient
    w <- (1 - lr weight_decay) w - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    Arithmetic is in float32, or float64 for weights of that type. Weights and moments that are stored in bfloat16 are
    rounded stochastically, so that their expected value is that of the arithmetic; the update uses moments before they
    are rounded.

    Args:
        factor: Of the gradient, as clipping wants it.
        step: 1 for the first.
        seed: Of the rounding, between 0 and 2^63; together with the step it decides about all of it.
        block: Columns of one target; 0 if no sums are asked for.

    Returns:
        Sums of squares of the new weights, as stored, over each row's blocks; None without a block.

    Raises:
        ShapeError: a row is not a whole number of blocks, or what is updated does not lie in memory as one piece.
    """
    _check({"weight": weight, "first": first, "second": second}, block)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    width = block or _WIDTH
    n_spans = triton.cdiv(weight.numel(), width)
    columns = min(_TILE, max(16, triton.next_power_of_2(width)))
    sums = torch.empty(len(weight), weight.shape[1] // block, dtype=dtype, device=weight.device) if block else None
    # in float64 and as a tensor: Triton passes numbers as float32
    scalars = _scalars(lr, beta1, beta2, eps, weight_decay, factor, step).to(weight.device, non_blocking=True)
    spans = _TILE // columns
    with torch.cuda.device_of(weight):
        _update[(triton.cdiv(n_spans, spans),)](
            weight,
            gradient.contiguous(),
            first,
            second,
            sums,
            scalars,
            n_spans,
            weight.numel(),
            width,
            seed,
            step,
            TYPE=tl.float64 if dtype == torch.float64 else tl.float32,
            SPANS=spans,
            COLUMNS=columns,
        )
    return sums


def _check(tensors: dict[str, Tensor], block: int) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ShapeError(
                "a contiguous matrix",
                found=f"strides {tensor.stride()} of shape {tuple(tensor.shape)}",
                where=name,
                fix="update a matrix that is stored row by row, without gaps",
            )
    if block and tensors["weight"].shape[1] % block:
        raise ShapeError(
            f"rows of whole blocks of {block}",
            found=f"{tensors['weight'].shape[1]} columns",
            where="weight",
            fix="give the width of one target's columns",
        )


def _scalars(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, factor: float, step: int
) -> Float[Tensor, " _"]:
    """What an update multiplies and adds, in the order in which the kernel reads it."""
    correction = 1 / (1 - beta2**step) ** 0.5
    return torch.tensor(
        [factor, beta1, beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), correction, eps], dtype=torch.float64
    )
