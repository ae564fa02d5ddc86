"""A training that begins with a finished transcoder in place of starting values."""

from dataclasses import fields, replace

import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import TrainConfig
from circuitmill.core.adapters import adapt, unfold
from circuitmill.core.scaling import Scaling
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.training.parallel.cut import cut
from circuitmill.training.parallel.layout import Layout, alone
from circuitmill.training.state import TrainState, make_state


def state_from_base(cfg: TrainConfig, base: Transcoder, scaling: Scaling, layout: Layout | None = None) -> TrainState:
    """A training of all parameters of a finished transcoder, or of a low-rank change of its decoders.

    Thresholds are the base's: trained on with jumprelu if all is trained, ignored by top-k kinds, which set them at the
    end. `cfg.init` has no say.

    Args:
        cfg: Its architecture is the base's; Matryoshka prefixes may differ.
        base: In raw units; not changed.
        scaling: To the normalised units of the activations to train on, on the base's device.
        layout: Of the ranks, each of which trains its shard of the base; None is one.

    Raises:
        ConfigError: another architecture or number of features, thresholds that the nonlinearity cannot take over, or
            decoders that cannot be changed by one of low rank.
        ShapeError: the activations have another number of layers or another width.
    """
    _check_shape(cfg, base, scaling)
    _check_architecture(cfg.architecture, base.architecture)
    _check_thresholds(cfg, base)
    torch.manual_seed(cfg.seed)
    transcoder = unfold(base, scaling)
    transcoder.architecture = replace(transcoder.architecture, prefixes=cfg.architecture.prefixes)
    layout = layout or alone(cfg.n_features)
    if cfg.adapter_rank:
        adapt(transcoder, cfg.adapter_rank, generator=torch.Generator().manual_seed(cfg.seed))
    else:
        transcoder.requires_grad_(True)
        transcoder.log_threshold.requires_grad_(cfg.nonlinearity.name == "jumprelu")
    return make_state(cfg, cut(transcoder, layout.shard), layout)


def _check_shape(cfg: TrainConfig, base: Transcoder, scaling: Scaling) -> None:
    ours, theirs = tuple(scaling.input_scale.shape), (base.n_layers, base.d_model)
    if ours != theirs:
        raise ShapeError(
            f"a base of {ours[0]} layers and width {ours[1]}, as the activations have",
            found=f"{theirs[0]} layers, width {theirs[1]}",
            where="train.base",
            fix="use a base that was trained on a model of this shape",
        )
    if cfg.n_features != base.n_features:
        raise ConfigError(
            f"as many features as the base has ({base.n_features})",
            found=cfg.n_features,
            where="train.n_features",
            fix="set it to that number",
        )


def _check_architecture(ours: ArchitectureConfig, base: ArchitectureConfig) -> None:
    # prefixes matter while training only, and folding scales in makes factors for decoders that targets share
    implied = replace(ours, pair_scale=ours.pair_scale or ours.decoder == "source")
    for field in fields(ArchitectureConfig):
        expected, found = getattr(base, field.name), getattr(implied, field.name)
        if field.name != "prefixes" and expected != found:
            raise ConfigError(
                f"{expected!r}, as the base has",
                found=repr(found),
                where=f"train.architecture.{field.name}",
                fix="give the base's architecture; what the base shares over models is shared no more in its file",
            )


def _check_thresholds(cfg: TrainConfig, base: Transcoder) -> None:
    """ReLU has thresholds of zero, and a threshold of zero cannot be trained, because its logarithm is."""
    name, zero = cfg.nonlinearity.name, base.threshold == 0
    if name == "relu" and not bool(zero.all()):
        raise ConfigError(
            "jumprelu or a top-k kind for a base whose features have thresholds above zero",
            found=name,
            where="train.nonlinearity.name",
            fix="set jumprelu, which takes them over",
        )
    if name == "jumprelu" and not cfg.adapter_rank and bool(zero.any()):
        raise ConfigError(
            f"relu, or an adapter, for a base in which {int(zero.sum())} features have a threshold of zero",
            found=name,
            where="train.nonlinearity.name",
            fix="set relu or a train.adapter_rank above 0: a threshold of zero stays where it is",
        )
