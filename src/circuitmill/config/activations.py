"""Which activations a run works on: of which model or models, at which hookpoint, in which layers.

Stages calibrate and cache have these keys, and those of calibrate follow those of cache unless they are set.
"""

from typing import Literal, Protocol, runtime_checkable

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError

Single = Literal["mlp_in", "mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post"]
"""Hookpoints at which one thing is read, which is then reconstructed too."""
Hookpoint = Literal["mlp", Single]
"""The same, and the pair of an MLP's input, which is read, and its output, which is reconstructed."""


@runtime_checkable
class ActivationsConfig(Protocol):
    """What the configurations of stages calibrate and cache have in common."""

    @property
    def model(self) -> ModelConfig:
        """The model whose activations they are."""
        ...

    @property
    def hookpoint(self) -> Hookpoint:
        """Where in a block."""
        ...

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Blocks, counted from 0; None is all."""
        ...

    @property
    def second_model(self) -> ModelConfig | None:
        """Another model, run on the same tokens."""
        ...


def check_activations(cfg: ActivationsConfig, stage: str) -> None:
    """Refuse what makes no sense together.

    Args:
        cfg: The configuration of a stage.
        stage: Its name.

    Raises:
        ConfigError: names the key.
    """
    layers, second = cfg.layers, cfg.second_model
    only = "null with hookpoint mlp: transcoders of MLPs take those of all layers of one model"
    pair = cfg.hookpoint == "mlp"
    for key, value in (("layers", layers), ("second_model", second)):
        if value is not None and pair:
            raise ConfigError(
                only,
                found=_show(value),
                where=f"{stage}.{key}",
                fix="choose another cache.hookpoint, such as resid_post, or set null",
            )
    if layers is not None and (not layers or layers[0] < 0 or list(layers) != sorted(set(layers))):
        raise ConfigError(
            "numbers of layers from 0, increasing, or null for all",
            found=_show(layers),
            where=f"{stage}.layers",
            fix="list each layer once, lowest first",
        )
    if second is None:
        return
    if second == cfg.model:
        raise ConfigError(
            "another model than the first",
            found=f"{second.name} twice",
            where=f"{stage}.second_model",
            fix="name the model to compare with, or set null",
        )
    if second.source == "toyworld" != cfg.model.source:
        raise ConfigError(
            "an embedded second model only beside an embedded first one: other runs have no stage toyworld",
            found=f"model.source {cfg.model.source}",
            where=f"{stage}.second_model.source",
            fix="set model=toyworld, or name another second model",
        )


def _show(value: object) -> str:
    if isinstance(value, ModelConfig):
        return value.name
    return str(list(value)) if isinstance(value, tuple) else str(value)
