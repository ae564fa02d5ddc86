"""Options of stage `train`: the cross-layer transcoder, its losses and its optimisation. Budgets are in tokens."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class InitConfig:
    """Starting values."""

    threshold: float
    """Of every feature, in units of the pre-activation (of inputs with mean square 1 per dimension)."""
    encoder_bias: Literal["zero", "firing_rate"]
    """Zero, or such that every feature fires on the same share of the first batch."""
    l0: float
    """With firing_rate: features per layer and token that fire at the start."""
    decoder_bias: Literal["zero", "mean"]
    """Zero, or the mean normalised MLP output."""


@dataclass(frozen=True)
class LossConfig:
    """Coefficients of the loss; every term is summed over d_model, layers and features, averaged over tokens."""

    sparsity: float
    """Coefficient of tanh(scale * norm * activation) at the end of its linear ramp over the whole run."""
    sparsity_scale: float
    """Inside the hyperbolic tangent: reciprocal of the written length that counts as active."""
    pre_activation: float
    """Coefficient of relu(threshold - pre-activation) * norm, which keeps idle features within reach."""
    auxiliary: float
    """Coefficient of the error that dead features leave when asked to explain what the others miss; 0 is off."""
    auxiliary_k: int
    """Dead features per layer and token that take part in it."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained transcoder."""

    seed: int
    """Decides starting values and the order of tokens."""
    n_features: int
    """Features per layer."""
    tokens: int
    """Length of the training in tokens; may exceed the cache, which is then read again in another order."""
    batch_tokens: int
    """Tokens per step, over all ranks."""
    pool_tokens: int
    """Tokens that are shuffled together; two such pools are in memory, over all ranks."""
    bandwidth: float
    """Width of the kernel for the derivative by the threshold, in units of the pre-activation."""
    threshold_derivative: Literal["chain", "direct"]
    """What the log-threshold receives: the true chain rule, or the derivative by the threshold itself."""
    init: InitConfig
    """Starting values."""
    loss: LossConfig
    """The terms of the loss."""
    lr: float
    """Learning rate of Adam after the warm-up."""
    warmup_tokens: int
    """Tokens over which the learning rate rises linearly from zero."""
    decay_share: float
    """Last share of the training over which it falls linearly to zero."""
    beta1: float
    """Adam's decay of the mean gradient."""
    beta2: float
    """Adam's decay of the mean squared gradient."""
    adam_eps: float
    """Added to Adam's denominator."""
    clip_norm: float
    """Gradients are scaled down to at most this norm over all parameters."""
    dead_tokens: int
    """A feature that has not fired for so many tokens counts as dead."""
    log_tokens: int
    """Tokens between two rows of metrics."""
    checkpoint_tokens: int
    """Tokens between two checkpoints."""
    keep_checkpoints: int
    """Newest checkpoints that stay on disk."""
    wandb: bool
    """Mirror the metrics to Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __post_init__(self) -> None:
        positive = {
            "n_features": self.n_features,
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "pool_tokens": self.pool_tokens,
            "bandwidth": self.bandwidth,
            "lr": self.lr,
            "adam_eps": self.adam_eps,
            "clip_norm": self.clip_norm,
            "dead_tokens": self.dead_tokens,
            "log_tokens": self.log_tokens,
            "checkpoint_tokens": self.checkpoint_tokens,
            "keep_checkpoints": self.keep_checkpoints,
            "init.threshold": self.init.threshold,
            "init.l0": self.init.l0,
            "loss.sparsity_scale": self.loss.sparsity_scale,
            "loss.auxiliary_k": self.loss.auxiliary_k,
        }
        for key, value in positive.items():
            _require(value > 0, "a number above 0", value, key)
        for key in ("sparsity", "pre_activation", "auxiliary"):
            value = getattr(self.loss, key)
            _require(value >= 0, "a number of at least 0", value, f"loss.{key}")
        for key in ("beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, "a number from 0 to below 1", getattr(self, key), key)
        _require(0 <= self.decay_share <= 1, "a share from 0 to 1", self.decay_share, "decay_share")
        _require(
            self.init.l0 < self.n_features,
            f"fewer than n_features ({self.n_features})",
            self.init.l0,
            "init.l0",
        )
        _require(
            self.batch_tokens <= self.tokens,
            f"at most tokens ({self.tokens})",
            self.batch_tokens,
            "batch_tokens",
        )
        _require(
            self.batch_tokens <= self.pool_tokens,
            f"at most pool_tokens ({self.pool_tokens})",
            self.batch_tokens,
            "batch_tokens",
        )
        _require(
            0 <= self.warmup_tokens <= self.tokens * (1 - self.decay_share),
            "at most what the decay leaves of tokens",
            self.warmup_tokens,
            "warmup_tokens",
        )

    @property
    def steps(self) -> int:
        """Whole batches in the training."""
        return self.tokens // self.batch_tokens


def _require(condition: bool, expected: str, found: object, key: str) -> None:
    if not condition:
        raise ConfigError(expected, found=found, where=f"train.{key}", fix="correct the value")
