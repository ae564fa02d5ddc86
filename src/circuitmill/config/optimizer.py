"""How a training's parameters follow the gradient."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow the gradient, besides the learning rate."""

    name: Literal["adam", "adamw", "adam8bit", "muon", "schedule_free"] = "adam"
    """Adam; with decoupled weight decay; with 8-bit moments (torchao); Muon for matrices and AdamW for the rest; or
    schedule-free AdamW (schedulefree)."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.999
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled; adamw, muon and schedule_free only."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this norm over all parameters."""
    precision: Literal["float32", "bf16_autocast", "bf16", "fp16"] = "float32"
    """float32; products in bfloat16; parameters too, rounded stochastically; products in float16, the loss scaled."""
    moments: Literal["float32", "bf16"] = "float32"
    """adam and adamw: type of both moments of matrices; bfloat16 is rounded stochastically."""
    lazy: bool = False
    """adam and adamw: leave a feature's decoders alone while they have no gradient; they catch up when they get one."""
    micro_batches: int = 1
    """Parts of a rank's batch that are worked on one after the other; divides it."""

    def __post_init__(self) -> None:
        decays, averages = self.name in ("adamw", "muon", "schedule_free"), self.name == "schedule_free"
        adam = self.name in ("adam", "adamw")
        for key, good, expected in (
            ("beta1", 0 <= self.beta1 < 1, "a number from 0 to below 1"),
            ("beta2", 0 <= self.beta2 < 1, "a number from 0 to below 1"),
            ("eps", self.eps > 0, "a number above 0"),
            ("clip_norm", self.clip_norm > 0, "a number above 0"),
            ("micro_batches", self.micro_batches > 0, "a number above 0"),
            ("weight_decay", self.weight_decay >= 0, "a number of at least 0"),
            ("weight_decay", self.weight_decay == 0 or decays, f"0 with {self.name}"),
            ("beta1", self.beta1 > 0 or not averages, "a number above 0 with schedule_free, whose average needs it"),
            ("moments", adam or self.moments == "float32", f"float32 with {self.name}"),
            ("lazy", adam or not self.lazy, f"false with {self.name}"),
            (
                "beta1",
                not self.lazy or self.beta1**2 < self.beta2,
                f"a number below the root of beta2 ({self.beta2:g}) with lazy, or what features miss grows without end",
            ),
            (
                "precision",
                self.precision != "bf16" or not averages,
                "another with schedule_free, whose averages move by less than bfloat16 can hold",
            ),
        ):
            if not good:
                raise ConfigError(
                    expected, found=getattr(self, key), where=f"train.optimizer.{key}", fix="correct the value"
                )

    @property
    def by_rows(self) -> bool:
        """Whether matrices are updated in blocks of rows."""
        return self.name in ("adam", "adamw") and (self.lazy or "bf16" in (self.moments, self.precision))
