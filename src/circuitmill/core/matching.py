"""Which features of two dictionaries are the same, told from what they write rather than from their numbers."""

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

COSINE = 0.7
"""Least cosine of two decoder vectors that count as one feature."""
_ROWS = 1024
"""Features compared with a whole dictionary at a time."""


def nearest(
    vectors: Float[Tensor, "feature d_model"], others: Float[Tensor, "_ d_model"]
) -> tuple[list[int], list[float]]:
    """For each vector the place of the other one with the largest cosine, and that cosine. Both have unit length."""
    places: list[int] = []
    cosines: list[float] = []
    for rows in vectors.split(_ROWS):
        best = einsum(rows, others, "feature d_model, other d_model -> feature other").max(dim=1)
        places += best.indices.tolist()
        cosines += best.values.tolist()
    return places, cosines


def mutual_matches(
    left: Float[Tensor, "feature d_model"],
    right: Float[Tensor, "_ d_model"],
    wanted: Sequence[int],
    cosine: float = COSINE,
) -> dict[int, int]:
    """Pairs of features that are each other's nearest by cosine, at more than a least cosine.

    One-to-one. Costs two products of the wanted features with a whole dictionary.

    Args:
        left: Decoder vectors of one dictionary; those of several targets concatenated.
        right: Of the other.
        wanted: Features of the left dictionary to look for.

    Returns:
        Wanted feature -> its partner, without those that have none.

    >>> mutual_matches(torch.eye(3), torch.tensor([[0.0, 1, 0], [2, 0.1, 0]]), wanted=[0, 1, 2])
    {0: 1, 1: 0}
    """
    if not wanted:
        return {}
    left, right = normalize(left.float(), dim=1), normalize(right.float(), dim=1)
    partners, cosines = nearest(left[torch.tensor(wanted)], right)
    back, _ = nearest(right[torch.tensor(partners)], left)
    return {
        feature: partner
        for feature, partner, returned, value in zip(wanted, partners, back, cosines, strict=True)
        if returned == feature and value > cosine
    }
