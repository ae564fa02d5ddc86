"""What a training has in memory as parameters, counted on a transcoder that has shapes and no numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from circuitmill.config.train import TrainConfig
from circuitmill.core.adapters import Adapted
from circuitmill.core.decoders import Untied
from circuitmill.core.topology import Topology
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.training.parallel.fsdp import axes_of
from circuitmill.training.parallel.layout import chunk

_KINDS = {
    "W_enc": "encoder",
    "b_enc": "encoder biases",
    "log_threshold": "thresholds",
    "b_dec": "decoder biases",
    "W_skip": "skip connection",
    "decoder.pair_scale": "decoder factors",
    "decoder.pair_offset": "decoder factors",
}


@dataclass(frozen=True)
class Shape:
    """Of the activations that a transcoder reads and writes."""

    n_layers: int
    """Places at which they are taken."""
    d_model: int


@dataclass(frozen=True)
class Division:
    """How many ranks share what."""

    strategy: str
    ranks: int = 1
    feature_ranks: int = 1
    """Ranks that share the features of one copy."""

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that have different tokens."""
        return self.ranks // self.feature_ranks


@dataclass(frozen=True)
class Parameter:
    """Of a whole transcoder."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    features_axis: int | None
    """Along which it lists features; None if it does not, or if features cannot be divided."""
    own_blocks: bool
    """Whether it is the decoder of one source."""

    @property
    def kind(self) -> str:
        """Which half of the transcoder, in words."""
        if self.name.startswith("decoder.change."):
            return "adapter"
        return _KINDS.get(self.name.replace("decoder.base.", "decoder."), "decoder")

    @property
    def matrix(self) -> bool:
        """Whether it is a stack of matrices, which optimizers and precisions treat in their own way."""
        return len(self.shape) == 3

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Census:
    """A whole transcoder."""

    topology: Topology
    parameters: tuple[Parameter, ...]
    indivisible: str
    """Why features cannot be divided among ranks; empty if they can."""
    fsdp_axes: dict[int, tuple[int, ...]]
    """Number of ranks -> axis along which fully_shard divides each parameter."""

    def by_kind(self) -> dict[str, int]:
        """Numbers of parameters."""
        found: dict[str, int] = {}
        for parameter in self.parameters:
            found[parameter.kind] = found.get(parameter.kind, 0) + parameter.numel
        return found

    def here(self, division: Division) -> tuple[Parameter, ...]:
        """The parameters as the rank has them that has most; under fsdp, between steps."""
        if division.strategy == "fsdp":
            axes = self.fsdp_axes[division.ranks]
            return tuple(_cut(p, axis, division.ranks) for p, axis in zip(self.parameters, axes, strict=True))
        return tuple(_cut(p, p.features_axis, division.feature_ranks) for p in self.parameters)


def _cut(parameter: Parameter, axis: int | None, size: int) -> Parameter:
    if axis is None:
        return parameter
    shape = list(parameter.shape)
    shape[axis] = chunk(shape[axis], 0, size).n_features
    return replace(parameter, shape=tuple(shape))


def count(cfg: TrainConfig, shape: Shape, fsdp_ranks: Sequence[int] = ()) -> Census:
    """Count a transcoder's parameters.

    Args:
        cfg: Of the training.
        shape: Of the activations.
        fsdp_ranks: Numbers of ranks that fully_shard may have to divide parameters among.

    Raises:
        ShapeError: layers cannot be divided among the models of a crosscoder.
    """
    transcoder = _without_numbers(cfg, shape)
    axes, reason = feature_axes(transcoder)
    own = {p for module in transcoder.modules() if isinstance(module, Untied) for p in module.parameters()}
    parameters = tuple(
        Parameter(name, tuple(value.shape), value.requires_grad, axes.get(name), value in own)
        for name, value in transcoder.named_parameters()
    )
    by_ranks = {
        ranks: tuple(axes_of(transcoder, ranks)[value] for value in transcoder.parameters()) for ranks in fsdp_ranks
    }
    return Census(transcoder.topology, parameters, reason, by_ranks)


def feature_axes(transcoder: Transcoder) -> tuple[dict[str, int | None], str]:
    """Axes along which parameters list features, and why there are none; empty if there are."""
    try:
        return transcoder.feature_axes(), ""
    except ShapeError as error:
        return {}, str(error.found)


def _without_numbers(cfg: TrainConfig, shape: Shape) -> Transcoder:
    """What `training.state.start` or `training.finetune.state_from_base` makes, on the device without memory."""
    form = cfg.architecture
    if cfg.base and form.decoder == "source":
        # a finished transcoder of this form has factors, which hold the scales that were folded in
        form = replace(form, pair_scale=True)
    with torch.device("meta"):
        transcoder = Transcoder(shape.n_layers, cfg.n_features, shape.d_model, form)
        transcoder.log_threshold.requires_grad_(cfg.nonlinearity.name == "jumprelu")
        if cfg.adapter_rank:
            adapted = Adapted(transcoder.decoder, cfg.adapter_rank)
            transcoder.decoder = adapted
            transcoder.requires_grad_(False)
            adapted.change.requires_grad_(True)
    return transcoder
