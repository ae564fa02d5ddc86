"""Options of stage features."""

from dataclasses import dataclass

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class FeaturesConfig:
    """How much text features are looked up in, and what is kept of it."""

    model: ModelConfig
    """The model that the transcoder was trained on; its tokenizer and unembedding are used."""
    blocks: int
    """Jobs; each takes an equal share of every layer's features. At most the number of features per layer."""
    max_train_tokens: int | None
    """At most so many cached tokens of the train split, in whole sequences; null takes all."""
    max_heldout_tokens: int | None
    """The same for the held-out split."""
    window: int
    """Tokens in a window; sequences are cut into windows of this length. At most the context."""
    top_windows: int
    """Windows of largest activation per feature and split, no two with the same text up to the peak."""
    quantile_windows: int
    """Further windows per feature and split, evenly spread over activations."""
    silent_windows: int
    """Windows per feature and split in which it does not fire."""
    logits: int
    """Tokens that the feature promotes most, and as many that it suppresses most."""
    histogram_bars: int
    """Most bars in the histogram of a feature's activations."""
    words_before: int
    """Words in front of the peak's word that are kept as text."""
    seed: int
    """Of the samples of windows."""

    def __post_init__(self) -> None:
        for key in ("blocks", "window", "logits", "histogram_bars"):
            self._require(getattr(self, key) > 0, "a positive number", key)
        for key in ("top_windows", "quantile_windows", "silent_windows", "words_before", "seed"):
            self._require(getattr(self, key) >= 0, "zero or a positive number", key)
        for key in ("max_train_tokens", "max_heldout_tokens"):
            value = getattr(self, key)
            self._require(value is None or value > 0, "a positive number or null", key)
        self._require(self.blocks <= 10_000, "at most 10,000", "blocks")

    def _require(self, good: bool, expected: str, key: str) -> None:
        if not good:
            raise ConfigError(expected, found=repr(getattr(self, key)), where=f"features.{key}", fix="change the value")

    def units(self) -> tuple[str, ...]:
        """Names of the blocks: 0000, 0001, ..."""
        return tuple(f"{block:04d}" for block in range(self.blocks))
