"""How the ranks of a training share its work. What is computed is the same, but for the order of sums."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError

STRATEGIES = ("single", "ddp", "fsdp", "features", "mesh")


@dataclass(frozen=True)
class ParallelConfig:
    """Not part of what a training is: with other values, and on other numbers of ranks, it goes on where it was."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "features", "mesh"] = "auto"
    """single: one rank; ddp: ranks share the batch; fsdp: and parameters, gradients and optimizer between steps;
    features: ranks share the features; mesh: groups of ranks share the batch, the ranks of a group the features; auto:
    what fits."""
    feature_ranks: int = 0
    """mesh: ranks that share the features of one copy; 0 takes the fewest that fit."""
    wire: Literal["float32", "bf16"] = "float32"
    """Type in which partial reconstructions travel between ranks that share features."""
    overlap: bool = False
    """Send the reconstruction of each layer as soon as it is complete, while the next source is worked on."""
    timeout_s: float = 600.0
    """Seconds after which ranks that wait for another one give up."""

    def __post_init__(self) -> None:
        groups = self.strategy in ("auto", "mesh")
        for good, expected, key in (
            (self.feature_ranks >= 0, "a number of at least 0", "feature_ranks"),
            (self.feature_ranks == 0 or groups, "0, except with strategy mesh or auto", "feature_ranks"),
            (self.timeout_s > 0, "a number of seconds above 0", "timeout_s"),
        ):
            if not good:
                raise ConfigError(
                    expected, found=getattr(self, key), where=f"train.parallel.{key}", fix="correct the value"
                )
