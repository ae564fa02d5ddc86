"""The same layer with only the places that matter: features that fire, or nearly fire, on a token.

Outside the kernel of the straight-through derivative an inactive place contributes neither to the value nor
to any gradient of JumpReLU, decoder and tanh sparsity. Keeping the places with h > theta - bandwidth / 2 is
therefore exact, and with few of them (some per cent) several times faster on a CPU than products with a
matrix that is nearly all zero.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

WORTHWHILE = 0.12
"""Share of kept places up to which this is faster than the dense product; measured by benchmarks/train_step.py."""


@dataclass(frozen=True)
class Entries:
    """Kept places of a [token feature] matrix, row by row."""

    flat: Int[Tensor, " entry"]
    """token * n_features + feature, ascending."""
    feature: Int[Tensor, " entry"]
    """Column of each entry."""
    offsets: Int[Tensor, " token"]
    """Number of entries before each token's first."""
    n_features: int
    """Columns of the matrix."""

    @property
    def n_tokens(self) -> int:
        """Rows of the matrix."""
        return self.offsets.shape[0]

    def gather(self, matrix: Float[Tensor, "token feature"]) -> Float[Tensor, " entry"]:
        """The matrix's values at these places."""
        return matrix.reshape(-1)[self.flat]


@torch.no_grad()
def places_above(pre: Float[Tensor, "token feature"], floor: Float[Tensor, " feature"]) -> Entries:
    """The places where a pre-activation exceeds its feature's floor.

    >>> places_above(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.ones(2)).feature
    tensor([1, 0])
    """
    n_tokens, n_features = pre.shape
    flat = (pre > floor).flatten().nonzero().flatten()
    rows = torch.arange(n_tokens, device=pre.device) * n_features
    return Entries(flat, flat % n_features, torch.searchsorted(flat, rows), n_features)


def decode_entries(
    entries: Entries, values: Float[Tensor, " entry"], block: Float[Tensor, "feature target d_model"]
) -> Float[Tensor, "token target d_model"]:
    """What the kept features write: equal to the dense product with `values` at their places and zeros elsewhere."""
    written = nn.functional.embedding_bag(
        entries.feature, block.flatten(1), entries.offsets, mode="sum", per_sample_weights=values
    )
    return written.view(entries.n_tokens, *block.shape[1:])


def fired(entries: Entries, values: Float[Tensor, " entry"]) -> Bool[Tensor, " feature"]:
    """Which features have a value above zero on any token."""
    found = torch.zeros(entries.n_features, dtype=torch.bool, device=values.device)
    found[entries.feature[values > 0]] = True
    return found
