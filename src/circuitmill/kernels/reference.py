"""The sparse operators in plain PyTorch, one line of mathematics each: what the fast ones are compared with.

Shapes and meaning are those of `kernels.operators`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def decode(
    values: Float[Tensor, " entry"],
    feature: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    weight: Float[Tensor, "feature column"],
) -> Float[Tensor, "token column"]:
    """out[t] = sum over entries e of token t of values[e] weight[feature[e]]."""
    token = torch.arange(len(offsets) - 1, device=feature.device).repeat_interleave(offsets.diff())
    written = values[:, None] * weight[feature].to(values.dtype)
    return values.new_zeros(len(offsets) - 1, weight.shape[1]).index_add(0, token, written)


def dots(
    rows: Float[Tensor, "token column"],
    weight: Float[Tensor, "feature column"],
    feature: Int[Tensor, " entry"],
    token: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """out[e] = <rows[token[e]], weight[feature[e]]>."""
    return (rows[token] * weight[feature].to(rows.dtype)).sum(dim=1)


def segments(
    values: Float[Tensor, " entry"],
    rows: Float[Tensor, "token column"],
    token: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    dtype: torch.dtype,
) -> Float[Tensor, "feature column"]:
    """out[f] = sum over entries e of feature f of values[e] rows[token[e]]; entries are sorted by feature."""
    feature = torch.arange(len(offsets) - 1, device=token.device).repeat_interleave(offsets.diff())
    found = values.new_zeros(len(offsets) - 1, rows.shape[1])
    return found.index_add(0, feature, values[:, None] * rows[token].to(values.dtype)).to(dtype)


def above(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    floor: Float[Tensor, " feature"],
    row_floor: Float[Tensor, " token"],
    most: int,
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " _"]]:
    """Places where x weight^T + bias is above both floors, in compressed rows; none if there are more than `most`."""
    pre = x.to(bias.dtype) @ weight.to(bias.dtype).T + bias
    kept = (pre > floor) & (pre > row_floor[:, None])
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(dim=0)])
    feature = kept.nonzero()[:, 1]
    return (feature if len(feature) <= most else feature[:0]), offsets
