"""Sparse operators on a GPU, in Triton.

Each program handles a few hundred columns and gathers several rows at a time, so that many loads are under way at
once; it keeps one running sum for each of them and adds these at its end. Columns are the slow axis of every grid: at
any time the GPU works on one stretch of columns of all rows, and what different tokens gather from that stretch
(32,768 features times 512 columns in bfloat16 are 32 MiB) is found in its cache.

Sums have a fixed order: the same inputs give the same bits. They are taken in float32, or in float64 if the values
are. Positions are computed in 64 bits, since weights can have more than 2^31 numbers.
"""

# ruff: noqa: ANN001, ANN202
# what a kernel is given and returns are pointers, numbers and tiles of Triton's own

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_COLUMNS = 512
"""Columns of one program."""
_TILE = 4096
"""Numbers that a program gathers at a time: 32 for each of its 128 threads."""
PIECE = 1024
"""Entries that one program of `segments` adds up."""


# the type checker of the tests must not stand between Triton and a kernel's source, hence no_type_check
@triton.jit
@no_type_check
def _weighted_sums(
    values, index, begins, ends, places, matrix, out, n_columns, stride, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Row p of the sums is over entries begins[p] to ends[p]; written to places[p], or nowhere if ends < begins."""
    program = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins + program)
    end = tl.load(ends + program)
    if end >= begin:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < n_columns
        total = tl.zeros((ENTRIES, COLUMNS), values.dtype.element_ty)
        for first in range(begin, end, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            some = entry < end
            value = tl.load(values + entry, mask=some, other=0.0)
            row = tl.load(index + entry, mask=some, other=0).to(tl.int64)
            position = row[:, None] * stride + column[None, :]
            gathered = tl.load(matrix + position, mask=some[:, None] & inside[None, :], other=0.0)
            total += value[:, None] * gathered.to(total.dtype)
        place = program
        if places is not None:
            place = tl.load(places + program)
        tl.store(out + place * n_columns + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _partial_dots(
    rows,
    weight,
    feature,
    token,
    out,
    n_entries,
    n_columns,
    row_stride,
    weight_stride,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The part of each entry's dot product that is due to one stretch of columns."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    some = entry < n_entries
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = some[:, None] & (column < n_columns)[None, :]
    row = tl.load(token + entry, mask=some, other=0).to(tl.int64)
    left = tl.load(rows + row[:, None] * row_stride + column[None, :], mask=wanted, other=0.0)
    row = tl.load(feature + entry, mask=some, other=0).to(tl.int64)
    right = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=wanted, other=0.0)
    products = left.to(out.dtype.element_ty) * right.to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1).to(tl.int64) * n_entries + entry, tl.sum(products, axis=1), mask=some)


def decode(
    values: Float[Tensor, " entry"],
    feature: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    weight: Float[Tensor, "feature column"],
) -> Float[Tensor, "token column"]:
    """Row t is the sum of value * weight[feature] over the entries of token t.

    Args:
        offsets: Entries before each token's first, and their number.
    """
    out = values.new_empty(len(offsets) - 1, weight.shape[1])
    _add_up(values, feature, offsets[:-1], offsets[1:], weight, out)
    return out


def dots(
    rows: Float[Tensor, "token column"],
    weight: Float[Tensor, "feature column"],
    feature: Int[Tensor, " entry"],
    token: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """The dot product of rows[token] and weight[feature] for each entry.

    Entries may come in any order; in that of the tokens the GPU finds their rows in its nearest cache. Each stretch of
    512 columns leaves a number per entry, which are added at the end.
    """
    rows, weight = _with_dense_rows(rows), _with_dense_rows(weight)
    n_entries, n_columns = len(feature), rows.shape[1]
    width, height = _tile(n_columns)
    parts = rows.new_empty(triton.cdiv(n_columns, width), n_entries)
    with torch.cuda.device_of(rows):
        _partial_dots[(triton.cdiv(n_entries, height), len(parts))](
            rows,
            weight,
            feature.contiguous(),
            token.contiguous(),
            parts,
            n_entries,
            n_columns,
            rows.stride(0),
            weight.stride(0),
            ENTRIES=height,
            COLUMNS=width,
        )
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def segments(
    values: Float[Tensor, " entry"],
    rows: Float[Tensor, "token column"],
    token: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    dtype: torch.dtype,
) -> Float[Tensor, "feature column"]:
    """Row f is the sum of value * rows[token] over the entries of feature f, in the given type.

    One program adds up the entries of a feature. A feature that fires on most tokens would keep one program busy long
    after all others are done: more than `PIECE` entries are divided among several programs, whose sums are kept in the
    type of the values and added in the order of their numbers. That takes space for at most 2 / `PIECE` rows per entry.

    Args:
        values: Sorted by feature, as are their tokens.
        offsets: Entries before each feature's first, and their number.
        dtype: Of the result; sums are rounded once.
    """
    out = rows.new_empty(len(offsets) - 1, rows.shape[1], dtype=dtype)
    begins, ends = offsets[:-1], offsets[1:]
    if len(values) <= PIECE:
        _add_up(values, token, begins, ends, rows, out)
        return out
    n_pieces = torch.where(ends - begins > PIECE, (ends - begins + PIECE - 1) // PIECE, 0)
    _add_up(values, token, begins, torch.where(n_pieces > 0, begins - 1, ends), rows, out)
    # how many pieces there are is known on the GPU alone: c entries with c > PIECE make fewer than 2 c / PIECE
    last = n_pieces.cumsum(dim=0)
    piece = torch.arange(2 * len(values) // PIECE, device=values.device)
    owner = torch.searchsorted(last, piece, right=True).clamp(max=len(last) - 1)
    number = piece - (last - n_pieces)[owner]
    begin = begins[owner] + number * PIECE
    exists = piece < last[-1]
    sums = values.new_empty(len(piece), rows.shape[1])
    end = torch.where(exists, torch.minimum(begin + PIECE, ends[owner]), begin - 1)
    _add_up(values, token, begin, end, rows, sums)
    end = torch.where(exists & (number == 0), piece + n_pieces[owner], piece - 1)
    _add_up(torch.ones_like(piece, dtype=values.dtype), piece, piece, end, sums, out, places=owner)
    return out


def _add_up(
    values: Float[Tensor, " entry"],
    index: Int[Tensor, " entry"],
    begins: Int[Tensor, " row"],
    ends: Int[Tensor, " row"],
    matrix: Float[Tensor, "_ column"],
    out: Float[Tensor, "_ column"],
    places: Int[Tensor, " row"] | None = None,
) -> None:
    """Write the sum of value * matrix[index] over each stretch of entries to a row of `out`; see `_weighted_sums`."""
    matrix = _with_dense_rows(matrix)
    n_columns = matrix.shape[1]
    width, height = _tile(n_columns)
    with torch.cuda.device_of(out):
        _weighted_sums[(len(begins), triton.cdiv(n_columns, width))](
            values.contiguous(),
            index.contiguous(),
            begins,
            ends,
            places,
            matrix,
            out,
            n_columns,
            matrix.stride(0),
            ENTRIES=height,
            COLUMNS=width,
        )


def _tile(n_columns: int) -> tuple[int, int]:
    """Columns and entries of a program."""
    width = min(_COLUMNS, max(16, triton.next_power_of_2(n_columns)))
    return width, min(32, _TILE // width)


def _with_dense_rows(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
