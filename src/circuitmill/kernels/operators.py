"""Sparse operators as torch's own: with derivatives, with shapes known in advance, and an implementation per device.

| operator | formula | derivatives |
|---|---|---|
| decode | out[t] = sum over entries e of token t of values[e] weight[feature[e]] | dots, segments |
| dots | out[e] = <rows[token[e]], weight[feature[e]]> | decode, segments |
| segments | out[f] = sum over entries e of feature f of values[e] rows[token[e]] | none |
| above | where x weight^T + bias is above floors | none |

Entries are the kept places of a [token feature] matrix (`kernels.entries`). The first is a product with that matrix,
the second a product that is evaluated at the kept places alone, the third a product with the transposed matrix.
Together they are closed under differentiation, so that a step costs what the few features cost that are active.
`above` finds the places without keeping the matrix.

They add up in a fixed order and use no atomic operations on sums: the same input gives the same bits.
`kernels.reference` says what they compute; `kernels.cpu`, `kernels.fused` and `kernels.encode` (Triton) do.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.kernels import cpu
from circuitmill.kernels.entries import Entries


@torch.library.custom_op("circuitmill::segments", mutates_args=(), device_types="cpu")
def _segments(values: Tensor, rows: Tensor, token: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return cpu.segments(values, rows, token, offsets, dtype)


@_segments.register_kernel("cuda")
def _(values: Tensor, rows: Tensor, token: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    from circuitmill.kernels import fused

    return fused.segments(values, rows, token, offsets, dtype)


@_segments.register_fake
def _(values: Tensor, rows: Tensor, token: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((offsets.shape[0] - 1, rows.shape[1]), dtype=dtype)


@torch.library.custom_op("circuitmill::decode", mutates_args=(), device_types="cpu")
def _decode(
    values: Tensor,
    weight: Tensor,
    feature: Tensor,
    offsets: Tensor,
    token: Tensor,
    order: Tensor | None,
    ordered_token: Tensor | None,
    limits: Tensor | None,
) -> Tensor:
    return cpu.decode(values, feature, offsets, weight)


@_decode.register_kernel("cuda")
def _(values: Tensor, weight: Tensor, feature: Tensor, offsets: Tensor, *rest: Tensor | None) -> Tensor:
    from circuitmill.kernels import fused

    return fused.decode(values, feature, offsets, weight)


@_decode.register_fake
def _(values: Tensor, weight: Tensor, feature: Tensor, offsets: Tensor, *rest: Tensor | None) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, weight.shape[1])


@torch.library.custom_op("circuitmill::dots", mutates_args=(), device_types="cpu")
def _dots(
    rows: Tensor,
    weight: Tensor,
    feature: Tensor,
    offsets: Tensor,
    token: Tensor,
    order: Tensor | None,
    ordered_token: Tensor | None,
    limits: Tensor | None,
) -> Tensor:
    return cpu.dots(rows, weight, feature, token)


@_dots.register_kernel("cuda")
def _(rows: Tensor, weight: Tensor, feature: Tensor, offsets: Tensor, token: Tensor, *rest: Tensor | None) -> Tensor:
    from circuitmill.kernels import fused

    return fused.dots(rows, weight, feature, token)


@_dots.register_fake
def _(rows: Tensor, weight: Tensor, feature: Tensor, offsets: Tensor, token: Tensor, *rest: Tensor | None) -> Tensor:
    return rows.new_empty(feature.shape[0])


@torch.library.custom_op("circuitmill::above", mutates_args=(), device_types="cpu")
def _above(
    x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor, row_floor: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    return cpu.above(x, weight, bias, floor, row_floor, most)


@_above.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor, row_floor: Tensor, most: int) -> tuple[Tensor, Tensor]:
    from circuitmill.kernels import encode

    return encode.above(x, weight, bias, floor, row_floor, most)


@_above.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor, row_floor: Tensor, most: int) -> tuple[Tensor, Tensor]:
    number = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(number, dtype=torch.int64), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _by_weight(gradient: Tensor, rows: Tensor, sorted_by: list[Tensor], dtype: torch.dtype) -> Tensor:
    order, token, limits = sorted_by
    return _segments(gradient[order], rows, token, limits, dtype)


def _decode_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, weight, feature, offsets, token, *sorted_by = ctx.saved_tensors
    gradient = gradient.contiguous()
    needs_values, needs_weight, *_ = ctx.needs_input_grad
    return (
        _dots(gradient, weight, feature, offsets, token, None, None, None) if needs_values else None,
        _by_weight(values, gradient, sorted_by, weight.dtype) if needs_weight else None,
        *[None] * 6,
    )


def _dots_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, feature, offsets, token, *sorted_by = ctx.saved_tensors
    gradient = gradient.contiguous()
    needs_rows, needs_weight, *_ = ctx.needs_input_grad
    return (
        _decode(gradient, weight, feature, offsets, token, None, None, None) if needs_rows else None,
        _by_weight(gradient, rows, sorted_by, weight.dtype) if needs_weight else None,
        *[None] * 6,
    )


_decode.register_autograd(_decode_backward, setup_context=_remember)
_dots.register_autograd(_dots_backward, setup_context=_remember)


def _places(entries: Entries, weight: Tensor) -> tuple[Tensor | None, ...]:
    here = (entries.feature, entries.offsets, entries.token)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return (*here, None, None, None)
    found = entries.by_feature
    return (*here, found.order, found.token, found.offsets)


def decode(
    values: Float[Tensor, " entry"], entries: Entries, weight: Float[Tensor, "feature column"]
) -> Float[Tensor, "token column"]:
    """For each token the weighted sum of the rows of its features.

    Args:
        values: Of the entries; float32 or float64, in which the sum is made.
        entries: Which feature, which token.
        weight: Table of rows; may be stored in fewer bits.
    """
    # einsum(matrix, weight, "token feature, feature column -> token column")
    return _decode(values, weight, *_places(entries, weight))


def dots(
    rows: Float[Tensor, "token column"], entries: Entries, weight: Float[Tensor, "feature column"]
) -> Float[Tensor, " entry"]:
    """Products of the rows of a token and of a feature, for each entry.

    Args:
        rows: By token; float32 or float64, in which products are added up.
        entries: Which feature, which token.
        weight: By feature; may be stored in fewer bits.
    """
    # einsum(rows, weight, "token column, feature column -> token feature") at the entries
    return _dots(rows, weight, *_places(entries, weight))


def above(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    floor: Float[Tensor, " feature"],
    most: int,
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " _"]]:
    """Places at which x weight^T + bias is above the feature's floor; a GPU never holds the matrix.

    Args:
        x: Inputs; rounded to bfloat16 for the product where autocast says so.
        weight: Encoders.
        bias: Float32, as the sum is.
        floor: To be exceeded.
        most: Up to so many places are returned.

    Returns:
        Their features in compressed rows, and offsets by token. If there are more than `most`, no features and the
        offsets that they would have.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    no_floor = bias.new_full((len(x),), -torch.inf)
    return _above(x, weight, bias, floor, no_floor, most)
