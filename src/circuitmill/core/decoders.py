"""Forms of decoders: what a source's active features write to its targets.

| form | W_dec^{s->m} | parameters |
|---|---|---|
| untied | its own | W_dec[s] [feature target d_model] |
| target | W_dec^m, shared by sources ("incremental") | W_dec [target feature d_model] |
| source | W_dec^s, shared by targets | W_dec [source feature d_model] |
| low_rank | Q^s P^{s,m} | Q [source feature rank], P [pair rank d_model] |
| shared models | of the first features the same for each model | W_shared, W_dec[0] [feature target d_model] |
| mixture (MOLT) | U_t V_t x in place of a vector | U, V [layer rank d_model] |

With `pair_scale` and `pair_offset` a source's activations become scale * a + offset * [a > 0] for each target, one
number per pair and feature. All parameters are zero (scales one) until an initialiser or a store fills them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitmill.core.lengths import lengths, root
from circuitmill.core.operand import Operand
from circuitmill.core.topology import Topology
from circuitmill.errors import ShapeError

ALL = slice(None)


def part_of(rows: Tensor, span: slice) -> Tensor:
    """Rows of a stretch. The whole is not sliced: the gradient of a slice is put among zeros."""
    return rows if span.indices(len(rows)) == (0, len(rows), 1) else rows[span]


class Decoder(nn.Module, ABC):
    """What the forms have in common."""

    _FEATURE_AXES: ClassVar[dict[str, int]] = {}
    _INDIVISIBLE: ClassVar[str] = ""

    def __init__(self, topology: Topology, n_features: int, d_model: int) -> None:
        super().__init__()
        self.topology, self.n_features, self.d_model = topology, n_features, d_model
        self._stacks: dict[str, Sequence[Tensor]] = {}
        self._lengths: dict[int, Tensor] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, parameters that list sources or targets are taken apart once, and gradients put together once.

        By index each gradient would be put among zeros.
        """
        self._stacks = self._taken_apart()
        try:
            yield
        finally:
            self._stacks, self._lengths = {}, {}

    def _taken_apart(self) -> dict[str, Sequence[Tensor]]:
        """Parameters by name, as tensors along their first axis."""
        return {}

    def _row(self, name: str, index: int) -> Tensor:
        stack = self._stacks.get(name)
        return getattr(self, name)[index] if stack is None else stack[index]

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """What a source's features write to each of its targets.

        Args:
            a: Activations of the features in `span`.
            x: What the source read; only a mixture of transforms needs it.
        """
        return rearrange(
            a.times(self.block(source, span).flatten(1)),
            "token (target d_model) -> token target d_model",
            d_model=self.d_model,
        )

    @abstractmethod
    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """Decoder vectors of a source's features, made from whatever the form keeps.

        Raises:
            ShapeError: what the features write is not a vector times the activation.
        """

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """Length of each feature's decoder vector, by target."""
        block = self.block(source)
        return lengths(block.flatten(0, 1)).view(block.shape[:2])

    def norms(self, source: int) -> Float[Tensor, " feature"]:
        """Length of each feature's decoder vectors put one after the other."""
        return torch.linalg.vector_norm(self.target_norms(source), dim=1)

    def feature_axes(self) -> dict[str, int | None]:
        """Axis along which each parameter lists the features of a source; None for one that all features share.

        Raises:
            ShapeError: features cannot be divided among processes by stretches.
        """
        if self._INDIVISIBLE:
            raise ShapeError(
                "features of which each has a row in every parameter",
                found=self._INDIVISIBLE,
                where="architecture",
                fix="share the batch instead of the features (strategy ddp or fsdp)",
            )
        return {name: self._FEATURE_AXES.get(name.partition(".")[0]) for name, _ in self.named_parameters()}

    @abstractmethod
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> "Decoder":
        """Divide what is written to each layer by these factors, in place.

        Returns:
            The decoder, or one of another form if this one cannot hold the change.
        """


class Untied(Decoder):
    """A tensor [feature target d_model] per source, so that a source and all its targets are one matrix product."""

    _FEATURE_AXES: ClassVar[dict[str, int]] = {"W_dec": 0}

    def __init__(self, topology: Topology, n_features: int, d_model: int, shared: int = 0) -> None:
        super().__init__(topology, n_features, d_model)
        self.W_dec = nn.ParameterList(
            torch.zeros(n_features - shared, len(writes), d_model) for writes in topology.writes
        )

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """Decoder vectors as they are."""
        return part_of(self.W_dec[source], span)

    def norms(self, source: int) -> Float[Tensor, " feature"]:
        """In one pass over the vectors."""
        return lengths(self.block(source).flatten(1))

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """Each block by its targets' factors."""
        for source, block in enumerate(self.W_dec):
            block.div_(factor[list(self.topology.writes[source])])
        return self


class SharedOverModels(Untied):
    """A crosscoder's first features have one decoder for all models ("Circuits Updates, February 2025")."""

    _INDIVISIBLE = "decoders that models share"

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, models: int, shared: int) -> None:
        super().__init__(topology, n_features, d_model, shared)
        self.models = models
        self.W_shared = nn.Parameter(torch.zeros(shared, topology.n_layers // models, d_model))

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """The shared decoders repeated for every model, then the exclusive ones."""
        return torch.cat([self.W_shared.repeat(1, self.models, 1), self.W_dec[source]])[span]

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """Models have factors of their own, so nothing is shared afterwards."""
        plain = Untied(self.topology, self.n_features, self.d_model).to(self.W_shared)
        plain.W_dec[0].copy_(self.block(0))
        return plain.divide_outputs(factor)


class _Paired(Decoder):
    """A factor and an offset per pair and feature, if asked for."""

    W_dec: nn.Parameter
    _FEATURE_AXES: ClassVar[dict[str, int]] = {"W_dec": 1, "pair_scale": 1, "pair_offset": 1}

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, scale: bool, offset: bool) -> None:
        super().__init__(topology, n_features, d_model)
        shape = (topology.n_pairs, n_features)
        self.pair_scale: nn.Parameter | None = nn.Parameter(torch.ones(shape)) if scale else None
        self.pair_offset: nn.Parameter | None = nn.Parameter(torch.zeros(shape)) if offset else None

    def _taken_apart(self) -> dict[str, Sequence[Tensor]]:
        return {name: parameter.unbind(0) for name, parameter in self.named_parameters()}

    def _length(self, index: int) -> Float[Tensor, " feature"]:
        """Of the decoder vectors of one source or target; while they are taken apart, computed once."""
        if not self._stacks:
            return lengths(self.W_dec[index])
        if index not in self._lengths:
            self._lengths[index] = lengths(self._row("W_dec", index))
        return self._lengths[index]

    def _adjusted(self, a: Operand, pair: int, span: slice) -> Operand:
        scale = None if self.pair_scale is None else part_of(self._row("pair_scale", pair), span)
        offset = None if self.pair_offset is None else part_of(self._row("pair_offset", pair), span)
        return a.adjusted(scale, offset)

    def _scaled(self, source: int, block: Tensor, span: slice) -> Tensor:
        """Decoder vectors [feature target d_model] with the factors in them."""
        if self.pair_offset is not None:
            raise ShapeError(
                "decoders without offsets",
                found="pair_offset",
                where="architecture",
                fix="train with pair_offset false for what needs one vector per feature and target",
            )
        if self.pair_scale is None:
            return block
        scale = self.pair_scale[list(self.topology.pairs(source)), span]
        return einsum(block, scale, "feature target d_model, target feature -> feature target d_model")

    def _scaled_norms(self, source: int, norms: Tensor) -> Float[Tensor, "feature target"]:
        if self.pair_scale is None:
            return norms
        return norms * self.pair_scale[list(self.topology.pairs(source))].T.abs()


class TargetTied(_Paired):
    """One decoder per target: sources that write there share it."""

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, scale: bool, offset: bool) -> None:
        super().__init__(topology, n_features, d_model, scale=scale, offset=offset)
        self.W_dec = nn.Parameter(torch.zeros(topology.n_layers, n_features, d_model))

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """One product per target."""
        pairs, targets = self.topology.pairs(source), self.topology.writes[source]
        return torch.stack(
            [
                self._adjusted(a, pair, span).times(part_of(self._row("W_dec", target), span))
                for pair, target in zip(pairs, targets, strict=True)
            ],
            dim=1,
        )

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """The targets' decoders, with the pairs' factors."""
        targets = list(self.topology.writes[source])
        return self._scaled(
            source, rearrange(self.W_dec[targets, span], "target feature d_model -> feature target d_model"), span
        )

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """Length by target, offsets left out."""
        norms = torch.stack([self._length(target) for target in self.topology.writes[source]], dim=1)
        return self._scaled_norms(source, norms)

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """Each target's decoder."""
        self.W_dec.div_(factor[:, None])
        return self


class SourceTied(_Paired):
    """One decoder per source: all its targets share it."""

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, scale: bool, offset: bool) -> None:
        super().__init__(topology, n_features, d_model, scale=scale, offset=offset)
        self.W_dec = nn.Parameter(torch.zeros(topology.n_sources, n_features, d_model))

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """One product if the targets have no factors of their own."""
        weight, pairs = part_of(self._row("W_dec", source), span), self.topology.pairs(source)
        if self.pair_scale is None and self.pair_offset is None:
            return a.times(weight)[:, None].expand(-1, len(pairs), -1)
        return torch.stack([self._adjusted(a, pair, span).times(weight) for pair in pairs], dim=1)

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """The source's decoder for each target, with the pairs' factors."""
        n_targets = len(self.topology.writes[source])
        return self._scaled(source, self.W_dec[source, span, None].expand(-1, n_targets, -1), span)

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """Length by target, offsets left out."""
        norms = self._length(source)[:, None]
        return self._scaled_norms(source, norms.expand(-1, len(self.topology.writes[source])))

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """The pairs' factors, which are made if there are none.

        Raises:
            ShapeError: the dimensions of a layer have different factors.
        """
        by_layer = factor[:, 0]
        if not torch.equal(factor, by_layer[:, None].expand_as(factor)):
            raise ShapeError(
                "one factor per layer for decoders that targets share",
                found="one per dimension",
                where="architecture",
                fix="train with scaling rms",
            )
        targets = [target for writes in self.topology.writes for target in writes]
        if self.pair_scale is None:
            self.pair_scale = nn.Parameter(self.W_dec.new_ones(self.topology.n_pairs, self.n_features))
        self.pair_scale.div_(by_layer[targets][:, None])
        if self.pair_offset is not None:
            self.pair_offset.div_(by_layer[targets][:, None])
        return self


class LowRank(Decoder):
    """Decoders that go through a few numbers: W_dec^{s->m} = Q^s P^{s,m}."""

    _FEATURE_AXES: ClassVar[dict[str, int]] = {"Q": 1}

    def __init__(self, topology: Topology, n_features: int, d_model: int, *, rank: int) -> None:
        super().__init__(topology, n_features, d_model)
        self.Q = nn.Parameter(torch.zeros(topology.n_sources, n_features, rank))
        self.P = nn.Parameter(torch.zeros(topology.n_pairs, rank, d_model))

    def _taken_apart(self) -> dict[str, Sequence[Tensor]]:
        return {"Q": self.Q.unbind(0), "P": self._by_source()}

    def _by_source(self) -> Sequence[Float[Tensor, "pair rank d_model"]]:
        return self.P.split([len(targets) for targets in self.topology.writes])

    def _outer(self, source: int) -> Float[Tensor, "pair rank d_model"]:
        return self._stacks["P"][source] if self._stacks else self._by_source()[source]

    def _wide(self, source: int) -> Float[Tensor, "rank column"]:
        return rearrange(self._outer(source), "pair rank d_model -> rank (pair d_model)")

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """Two thin products."""
        wide = a.times(part_of(self._row("Q", source), span)) @ self._wide(source)
        return rearrange(wide, "token (target d_model) -> token target d_model", d_model=self.d_model)

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """The product of both factors."""
        return rearrange(
            self.Q[source, span] @ self._wide(source),
            "feature (target d_model) -> feature target d_model",
            d_model=self.d_model,
        )

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """||q P||^2 = q (P P^T) q^T, so that no decoder vector is made."""
        outer, q = self._outer(source), self._row("Q", source)
        return root(einsum(q, outer @ outer.mT, q, "feature rank, pair rank column, feature column -> feature pair"))

    @torch.no_grad()
    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """The pairs' half."""
        targets = [target for writes in self.topology.writes for target in writes]
        self.P.div_(factor[targets][:, None])
        return self
