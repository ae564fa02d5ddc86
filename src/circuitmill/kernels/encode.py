"""Where pre-activations exceed floors, on a GPU and in Triton, without a matrix of pre-activations.

A matrix product is computed tile by tile, and of each tile only its comparisons leave the processor: one bit per place,
a thirty-second of the matrix in float32. A second kernel lists the places of the bits row by row, at positions that
follow from how many each row has. Nothing is guessed, sorted or added in an order that could vary.
"""

# ruff: noqa: ANN001, ANN202
# what a kernel is given and returns are pointers, numbers and tiles of Triton's own

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PLACES = 2**31
"""Places that are compared before their bits are read: 256 MiB of them."""
_WORDS = 32
"""Words of 32 bits that are listed at a time."""
_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TILES = {8: (32, 64, 16, 4), 4: (128, 64, 32, 8), 2: (128, 128, 64, 8)}
"""Tokens, features and columns of a tile and warps of a program, by bytes of a factor."""
_TOGETHER = 8
"""Tiles of tokens that share a tile of features in the cache."""


# the type checker of the tests must not stand between Triton and a kernel's source, hence no_type_check
@triton.jit
@no_type_check
def _compare(
    x,
    weight,
    bias,
    floor,
    row_floor,
    bits,
    counts,
    n_tokens,
    n_features,
    d_model,
    x_stride,
    weight_stride,
    TYPE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One tile of the comparisons, as bits, and how many hold in each of its rows."""
    n_blocks = tl.cdiv(n_features, FEATURES)
    program = tl.program_id(0)
    token_block, feature_block = tl.swizzle2d(
        program // n_blocks, program % n_blocks, tl.cdiv(n_tokens, TOKENS), n_blocks, TOGETHER
    )
    token = token_block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = feature_block.to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((TOKENS, FEATURES), TOTAL)
    for first in range(0, d_model, DEPTH):
        column = first + tl.arange(0, DEPTH)
        inside = column < d_model
        left = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < n_tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + feature[None, :] * weight_stride + column[:, None],
            mask=(feature < n_features)[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(left.to(TYPE), right.to(TYPE), total, input_precision=PRECISION, out_dtype=TOTAL)
    some = feature < n_features
    pre = total + tl.load(bias + feature, mask=some, other=0.0).to(TOTAL)[None, :]
    own = tl.load(floor + feature, mask=some, other=0.0).to(TOTAL)
    rows = tl.load(row_floor + token, mask=token < n_tokens, other=0.0).to(TOTAL)
    above = ((pre > own[None, :]) & (pre > rows[:, None]) & some[None, :]).to(tl.int32)
    tl.store(counts + token * n_blocks + feature_block, tl.sum(above, axis=1), mask=token < n_tokens)
    WORDS: tl.constexpr = FEATURES // 32
    shifted = tl.reshape(above, (TOKENS, WORDS, 32)) << tl.arange(0, 32)[None, None, :]
    word = token[:, None] * (n_blocks * WORDS) + feature_block * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(bits + word, tl.sum(shifted, axis=2), mask=(token < n_tokens)[:, None])


@triton.jit
@no_type_check
def _list(bits, offsets, out, n_words, WORDS: tl.constexpr):
    """The features of one token's bits, ascending."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(offsets + token)
    for first in range(0, n_words, WORDS):
        word = first + tl.arange(0, WORDS)
        packed = tl.load(bits + token * n_words + word, mask=word < n_words, other=0)
        above = tl.reshape((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1, (WORDS * 32,))
        number = tl.cumsum(above, axis=0)
        feature = (first * 32 + tl.arange(0, WORDS * 32)).to(tl.int64)
        tl.store(out + place + number - 1, feature, mask=above > 0)
        place += tl.sum(above, axis=0)


def above(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    floor: Float[Tensor, " feature"],
    row_floor: Float[Tensor, " token"],
    most: int,
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " _"]]:
    """Places where x weight^T + bias is above both floors, in compressed rows.

    Products are of the finer type of the two factors. Sums are float32, or float64 if that type is. Float32 factors are
    rounded to TF32, 11 bits, unless `torch.get_float32_matmul_precision` is "highest"; then each is the sum of two such
    numbers, for three times as many products.

    The host waits once for the number of places, or a few times if there are more than `PLACES` to compare.

    Args:
        row_floor: A second floor by token; minus infinity where there is none.
        most: If there are more places than that, none is listed.

    Returns:
        The feature of each place, and the number of places before each token's first and in all.
    """
    n_tokens, n_features = len(x), len(weight)
    counts, parts, found = [], [], 0
    step = max(1, PLACES // max(1, n_features))
    for first in range(0, n_tokens, step):
        bits, here = _compared(x[first : first + step], weight, bias, floor, row_floor[first : first + step])
        offsets = _offsets(here)
        counts.append(here)
        number = int(offsets[-1])
        found += number
        if found <= most:
            parts.append(_listed(bits, offsets, number))
    feature = torch.cat(parts) if found <= most and parts else x.new_empty(0, dtype=torch.int64)
    return feature, _offsets(torch.cat(counts) if counts else x.new_empty(0, dtype=torch.int64))


def _compared(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    floor: Float[Tensor, " feature"],
    row_floor: Float[Tensor, " token"],
) -> tuple[Int[Tensor, "token _"], Int[Tensor, " token"]]:
    """Comparisons as bits, 32 to a word, and how many of each row hold."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    n_tokens, n_features = len(x), len(weight)
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    tokens, features, depth, warps = _TILES[dtype.itemsize]
    n_blocks = triton.cdiv(n_features, features)
    bits = torch.empty(n_tokens, n_blocks * features // 32, dtype=torch.int32, device=x.device)
    counts = torch.empty(n_tokens, n_blocks, dtype=torch.int32, device=x.device)
    x, weight = (part if part.stride(1) == 1 else part.contiguous() for part in (x, weight))
    with torch.cuda.device_of(x):
        _compare[(triton.cdiv(n_tokens, tokens) * n_blocks,)](
            x,
            weight,
            bias.contiguous(),
            floor.contiguous(),
            row_floor.contiguous(),
            bits,
            counts,
            n_tokens,
            n_features,
            x.shape[1],
            x.stride(0),
            weight.stride(0),
            TYPE=_TYPES[dtype],
            TOTAL=tl.float64 if dtype == torch.float64 else tl.float32,
            PRECISION="tf32x3" if exact else "tf32",
            TOKENS=tokens,
            FEATURES=features,
            DEPTH=depth,
            TOGETHER=_TOGETHER,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
            num_stages=3,  # pyright: ignore[reportCallIssue]
        )
    return bits, counts.sum(dim=1)


def _offsets(counts: Int[Tensor, " token"]) -> Int[Tensor, " _"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])


def _listed(bits: Int[Tensor, "token _"], offsets: Int[Tensor, " _"], number: int) -> Int[Tensor, " entry"]:
    feature = torch.empty(number, dtype=torch.int64, device=bits.device)
    with torch.cuda.device_of(bits):
        _list[(len(bits),)](bits, offsets, feature, bits.shape[1], WORDS=_WORDS)
    return feature
