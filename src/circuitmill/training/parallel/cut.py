"""A shard of a transcoder, and the whole from its shards."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.decoders import Decoder
from circuitmill.core.parts import Shard
from circuitmill.core.transcoder import Transcoder
from circuitmill.training.parallel.layout import Layout


@torch.no_grad()
def cut(transcoder: Transcoder, shard: Shard) -> Transcoder:
    """Some features of each source, as a transcoder of these; biases of the outputs stay.

    Raises:
        ShapeError: features cannot be divided by stretches.
    """
    if shard.n_features == transcoder.n_features:
        return transcoder
    parts: dict[str, Tensor] = {}
    for name, axis in transcoder.feature_axes().items():
        value = transcoder.get_parameter(name).detach()
        parts[name] = value if axis is None else value.narrow(axis, shard.first, shard.n_features)
    return _with(transcoder, parts, shard.n_features, without_prefixes(transcoder.architecture))


def without_prefixes(architecture: ArchitectureConfig) -> ArchitectureConfig:
    """Of a shard: Matryoshka prefixes are of the whole, and matter to the loss alone."""
    return replace(architecture, prefixes=())


@torch.no_grad()
def join(transcoder: Transcoder, layout: Layout, architecture: ArchitectureConfig) -> Transcoder | None:
    """The whole transcoder in host memory of the first rank, one parameter at a time; None on the others.

    Args:
        transcoder: What this rank trains.
        layout: Of the training. All ranks must come here.
        architecture: Of the whole.
    """
    axes = transcoder.feature_axes() if layout.features.size > 1 else {}
    parts: dict[str, Tensor] = {}
    for name, value in transcoder.named_parameters():
        axis, whole = axes.get(name), value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        elif axis is not None:
            whole = layout.features.join(whole, axis, layout.shard.total)
        if layout.ranks.first:
            parts[name] = whole.cpu()
    if not layout.ranks.first:
        return None
    return _with(transcoder, parts, layout.shard.total, architecture)


def _with(
    transcoder: Transcoder, parameters: dict[str, Tensor], n_features: int, architecture: ArchitectureConfig
) -> Transcoder:
    """The same modules with other values, in memory of their own, and another number of features."""
    kept = {
        id(old): nn.Parameter(parameters[name].clone(), requires_grad=old.requires_grad)
        for name, old in transcoder.named_parameters()
    }
    made = copy.deepcopy(transcoder, kept)
    for module in made.modules():
        if isinstance(module, Transcoder | Decoder):
            module.n_features = n_features
    made.architecture = architecture
    return made
