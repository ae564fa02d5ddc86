"""The sparse operators on a CPU, by torch's embedding bags, which add up weighted rows of a table without copying them.

Decoding is a bag per token over the table of decoder vectors; a weight gradient is a bag per feature over the table of
the tokens' gradients; a gradient by activations is that of a bag's weights. Shapes and meaning are those of
`kernels.operators`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitmill.kernels.entries import places


def _bags(
    values: Float[Tensor, " entry"], index: Int[Tensor, " entry"], offsets: Int[Tensor, " _"], table: Tensor
) -> Float[Tensor, "row column"]:
    return nn.functional.embedding_bag(
        index, table.to(values.dtype), offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def decode(
    values: Float[Tensor, " entry"],
    feature: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    weight: Float[Tensor, "feature column"],
) -> Float[Tensor, "token column"]:
    """A bag per token."""
    return _bags(values, feature, offsets, weight)


def dots(
    rows: Float[Tensor, "token column"],
    weight: Float[Tensor, "feature column"],
    feature: Int[Tensor, " entry"],
    token: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """The gradient of a bag by the weights of its rows."""
    # the bag of each row is known, so that no offsets are needed
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, weight.to(rows.dtype), feature, feature.new_empty(0), token, 0
    )


def segments(
    values: Float[Tensor, " entry"],
    rows: Float[Tensor, "token column"],
    token: Int[Tensor, " entry"],
    offsets: Int[Tensor, " _"],
    dtype: torch.dtype,
) -> Float[Tensor, "feature column"]:
    """A bag per feature."""
    return _bags(values, token, offsets, rows).to(dtype)


def above(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    floor: Float[Tensor, " feature"],
    row_floor: Float[Tensor, " token"],
    most: int,
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " _"]]:
    """The matrix is made, and its few places are listed."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    pre = nn.functional.linear(x.to(dtype), weight.to(dtype)).to(bias.dtype) + bias
    kept = (pre > floor) & (pre > row_floor[:, None])
    offsets = torch.cat([bias.new_zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(dim=0)])
    return (places(kept).feature if int(offsets[-1]) <= most else offsets[:0].clone()), offsets
