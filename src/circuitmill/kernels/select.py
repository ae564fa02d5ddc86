"""Which places of a matrix hold the largest numbers of its rows, looking at few of them more than once.

The k largest maxima of disjoint blocks of a row are k different numbers of the row, so the k-th of them is a lower
bound of the row's k-th largest number. With 4 k blocks about 1.15 k numbers of independent, equally distributed ones
are above the bound: each place is looked at twice, once for its block's maximum and once for the comparison, and what
has to be ranked are few.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.kernels.entries import true_places

_BLOCKS_PER_KEPT = 4


@torch.no_grad()
def candidates(values: Float[Tensor, "row column"], k: int) -> Int[Tensor, " _"]:
    """Flat places, ascending: the k largest positive numbers of each row, all that equal the k-th, and few others.

    >>> candidates(torch.tensor([[3.0, -1.0, 2.0, 2.0, 0.0]]), 2)
    tensor([0, 2, 3])

    Args:
        values: To be ranked by row.
        k: At least 1.
    """
    least = lower_bound(values, k)
    return true_places(((values >= least) & (values > 0)).flatten())


@torch.no_grad()
def lower_bound(values: Float[Tensor, "row column"], k: int) -> Float[Tensor, "row 1"]:
    """A number that at least k of each row are not below; minus infinity if there are fewer."""
    rows, columns = values.shape
    if k >= columns:
        return values.new_full((rows, 1), -torch.inf)
    width = max(1, columns // (_BLOCKS_PER_KEPT * k))
    # interleaved blocks: their maxima are vector operations; what is left over at the end is not needed for a bound
    count = columns // width
    maxima = values[:, : count * width].unflatten(1, (width, count)).amax(dim=1) if width > 1 else values
    # kthvalue takes the k-th smallest
    return maxima.kthvalue(maxima.shape[1] - k + 1, dim=1, keepdim=True).values
