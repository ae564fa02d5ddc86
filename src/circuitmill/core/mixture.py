"""A sparse mixture of linear transforms: features that write a function of what they read, not a vector."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitmill.core.decoders import ALL, Decoder
from circuitmill.core.lengths import root
from circuitmill.core.operand import Operand
from circuitmill.core.topology import Topology
from circuitmill.errors import ShapeError


class Mixture(Decoder):
    """A sparse mixture of linear transforms: feature t writes a_t U_t V_t x (MOLT, "Circuits Updates, 2025").

    Transforms of one rank stand together, largest rank first; ranks r_0 > r_1 > ... have n, 2n, 4n ... transforms.
    """

    _INDIVISIBLE = "transforms of several ranks"

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, ranks: tuple[int, ...]) -> None:
        super().__init__(topology, n_features, d_model)
        unit = n_features // (2 ** len(ranks) - 1)
        self.groups = tuple((unit * 2**index, rank) for index, rank in enumerate(ranks))
        """(transforms, rank) of each group."""
        per_transform = [rank for count, rank in self.groups for _ in range(count)]
        self._starts = [0]
        for rank in per_transform:
            self._starts.append(self._starts[-1] + rank)
        total = self._starts[-1]
        self._ranks: Tensor
        self.register_buffer("_ranks", torch.tensor(per_transform), persistent=False)
        self.U = nn.Parameter(torch.zeros(topology.n_layers, total, d_model))
        self.V = nn.Parameter(torch.zeros(topology.n_layers, total, d_model))

    def _taken_apart(self) -> dict[str, Sequence[Tensor]]:
        return {"U": self.U.unbind(0), "V": self.V.unbind(0)}

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """Each transform of x, weighted by its activation.

        Raises:
            ShapeError: x is missing.
        """
        if x is None:
            raise ShapeError(
                "what the transforms are applied to",
                found="activations alone",
                where="decode",
                fix="pass the MLP inputs x too",
            )
        first, last, _ = span.indices(self.n_features)
        rows = slice(self._starts[first], self._starts[last])
        gates = a.dense().repeat_interleave(self._ranks[span], dim=1)
        # einsum(a, U, V, x, "token transform, transform rank e, transform rank d_model, token d_model -> token e")
        v, u = (self._row(name, source)[rows] for name in ("V", "U"))
        return (((x @ v.T) * gates) @ u)[:, None]

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """There is none.

        Raises:
            ShapeError: always.
        """
        raise ShapeError(
            "features that write a vector",
            found="transforms, which write a linear function of the input",
            where="architecture",
            fix="use a topology other than molt for what needs decoder vectors",
        )

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """||U V||_F^2 = trace((U^T U)(V V^T)), with products of the size of a rank only."""
        found, row = [], 0
        for count, rank in self.groups:
            ends = slice(row, row + count * rank)
            u, v = (self._row(name, source)[ends].view(count, rank, self.d_model) for name in ("U", "V"))
            found.append(root(((u @ u.mT) * (v @ v.mT)).sum(dim=(1, 2))))
            row += count * rank
        return torch.cat(found)[:, None]

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """The transforms' outer half."""
        self.U.div_(factor[:, None])
        return self

    @torch.no_grad()
    def multiply_inputs(self, factor: Float[Tensor, "layer d_model"]) -> None:
        """Change in place what is read by these factors."""
        self.V.mul_(factor[:, None])
