"""Options of stage calibrate."""

from dataclasses import dataclass

from circuitmill.config.activations import Hookpoint, check_activations
from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class CalibrateConfig:
    """How much of the train split the codecs' constants are taken from."""

    model: ModelConfig
    """The model whose activations are measured."""
    hookpoint: Hookpoint
    """Where in a block; as in stage cache, which must agree."""
    layers: tuple[int, ...] | None
    """Blocks; as in stage cache."""
    second_model: ModelConfig | None
    """Another model; as in stage cache."""
    tokens: int
    """Tokens whose moments are taken, BOS included, in whole sequences spread evenly over the train split."""
    sample_tokens: int
    """The first so many of them are kept in memory to measure how many bits a step costs."""
    batch_sequences: int
    """Sequences in one forward pass."""

    def __post_init__(self) -> None:
        for key in ("tokens", "sample_tokens", "batch_sequences"):
            if getattr(self, key) <= 0:
                raise ConfigError(
                    "a positive number",
                    found=repr(getattr(self, key)),
                    where=f"calibrate.{key}",
                    fix="change the value",
                )
        check_activations(self, "calibrate")
