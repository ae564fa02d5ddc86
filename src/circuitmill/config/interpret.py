"""Options of stage interpret."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class TokensConfig:
    """Of the explainer that needs no language model."""

    cost: float
    """False alarms, in tokens, that one more word or context in an explanation is worth."""
    max_clauses: int
    """Most kinds of cause joined by "also on"."""
    min_gain: float
    """Rise of the F1 score over train tokens that a further clause must bring."""
    min_windows: int
    """Firing train windows below which a feature is called rare and not explained."""
    max_listed: int
    """Words listed in an explanation before "+N more"."""
    max_words: int
    """Words kept in column `words`."""
    max_promoted: int
    """Promoted tokens that are named."""
    min_separation: float
    """How many standard deviations a promoted token's logit lies above those of the tail."""

    def __post_init__(self) -> None:
        for key in ("max_clauses", "min_windows", "max_listed", "max_words"):
            _require(getattr(self, key) > 0, "a positive number", getattr(self, key), f"tokens.{key}")
        for key in ("cost", "max_promoted", "min_separation"):
            _require(getattr(self, key) >= 0, "zero or a positive number", getattr(self, key), f"tokens.{key}")
        _require(0 <= self.min_gain < 1, "a number from 0 to 1", self.min_gain, "tokens.min_gain")


@dataclass(frozen=True)
class DetectionConfig:
    """Of the score on held-out windows."""

    min_windows: int
    """Firing, and silent, held-out windows below which a feature is not scored."""

    def __post_init__(self) -> None:
        _require(self.min_windows > 0, "a positive number", self.min_windows, "detection.min_windows")


@dataclass(frozen=True)
class InterpretConfig:
    """Who explains features, and how the explanations are scored."""

    blocks: int
    """Jobs: those of stage features."""
    explainer: Literal["tokens"]
    """Who writes explanations: `tokens` by what a feature fires on and promotes."""
    tokens: TokensConfig
    """Options of explainer `tokens`."""
    detection: DetectionConfig
    """Options of the score."""

    def __post_init__(self) -> None:
        _require(0 < self.blocks <= 10_000, "from 1 to 10,000", self.blocks, "blocks")

    def units(self) -> tuple[str, ...]:
        """Names of the blocks, as in stage features: 0000, 0001, ..."""
        return tuple(f"{block:04d}" for block in range(self.blocks))


def _require(good: bool, expected: str, found: object, key: str) -> None:
    if not good:
        raise ConfigError(expected, found=repr(found), where=f"interpret.{key}", fix="change the value")
