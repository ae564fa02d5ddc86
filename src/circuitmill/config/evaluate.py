"""Options of stage evaluate."""

from dataclasses import dataclass

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """How much held-out text a transcoder is measured on."""

    model: ModelConfig
    """The model that the transcoder was trained on."""
    max_tokens: int | None
    """At most so many held-out tokens, BOS included, in whole sequences from the start; null takes all."""
    max_one_layer_tokens: int | None
    """The same for replacing one layer at a time, which takes three forward passes per layer."""
    max_task_items: int | None
    """At most so many questions per task of the embedded model; null takes all."""
    density_bins: int
    """Bars per decade in the histogram of log10 density."""

    def __post_init__(self) -> None:
        for key in ("max_tokens", "max_one_layer_tokens", "max_task_items"):
            value = getattr(self, key)
            self._require(value is None or value > 0, "a positive number or null", key)
        self._require(self.density_bins > 0, "a positive number", "density_bins")

    def _require(self, good: bool, expected: str, key: str) -> None:
        if not good:
            raise ConfigError(expected, found=repr(getattr(self, key)), where=f"evaluate.{key}", fix="change the value")
