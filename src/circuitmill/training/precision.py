"""What is computed and stored in fewer bits than float32 (`train.optimizer.precision`).

| precision | products | trained matrices | gradients, moments |
|---|---|---|---|
| float32 | float32 | float32 | float32 |
| bf16_autocast | bfloat16 | float32 | float32 |
| bf16 | bfloat16 | bfloat16, rounded stochastically | of matrices bfloat16; moments float32 |
| fp16 | float16 | float32 | float32, of the scaled loss |

With `train.optimizer.moments` bf16 the moments of matrices are bfloat16 too, rounded stochastically, whatever the
precision.

Pre-activations, activations, reconstructions and every sum of the loss are float32 throughout. Biases, thresholds and
factors are few and stay in float32; so do parameters that are not trained.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, DivergedError

PRODUCTS = {"bf16_autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the factors, by precision."""
SKIPPED = 20
"""Updates that float16 may leave out in a row. The scale starts at 2^16, so by then it is below 1 and no longer why."""


def products(precision: str, device: torch.device) -> AbstractContextManager:
    """Inside, factors of matrix products are rounded as the precision says."""
    dtype = PRODUCTS.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def store_matrices(transcoder: Transcoder, cfg: TrainConfig) -> None:
    """Round what is trained and stored in bfloat16, once, to the nearest; other precisions store float32.

    Raises:
        ConfigError: this device cannot train with the precision.
    """
    own, device = cfg.optimizer, transcoder.b_dec.device
    if own.precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            "a GPU with precision fp16",
            found=f"device {device.type}",
            where="train.optimizer.precision",
            fix="set it to bf16_autocast or float32",
        )
    if own.precision != "bf16":
        return
    for parameter in transcoder.parameters():
        if parameter.requires_grad and parameter.ndim == 3:
            parameter.data = parameter.data.bfloat16()


class LossScale:
    """Keeps gradients in the range of float16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).

    The loss is multiplied by a factor and gradients are divided by it before anything looks at them. When one is not
    finite the update is left out and the factor halved; after 2,000 updates in a row it is doubled.
    """

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type)
        self._skipped = 0

    @property
    def scale(self) -> float:
        """The factor."""
        return self._scaler.get_scale()

    def scaled(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to differentiate."""
        return self._scaler.scale(loss)

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Divide the gradients of what these optimize; once per step."""
        for optimizer in optimizers:
            self._scaler.unscale_(optimizer)

    def accepts(self, norm: float, step: int) -> bool:
        """Whether to make the update; adapts the factor.

        Args:
            norm: Of all gradients together, over all ranks.
            step: For the message.

        Raises:
            DivergedError: too many updates in a row were left out.
        """
        finite = math.isfinite(norm)
        self._scaler.update()
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped >= SKIPPED:
            raise DivergedError(
                f"a finite gradient in one of {SKIPPED} steps",
                found=f"none up to step {step}, at a loss scale of {self.scale:g}",
                where="train",
                fix="set train.optimizer.precision to bf16_autocast, or lower train.lr",
            )
        return finite

    def tensor(self) -> Float[Tensor, " _"]:
        """The state."""
        state = self._scaler.state_dict()
        return torch.tensor([state["scale"], state["_growth_tracker"], self._skipped], dtype=torch.float64)

    def restore(self, saved: Float[Tensor, " _"]) -> None:
        """Take over a saved state."""
        scale, growth, skipped = saved.tolist()
        self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})
        self._skipped = int(skipped)


def require_finite(value: float, name: str, step: int) -> None:
    """Stop before an update that would spoil the parameters.

    Raises:
        DivergedError: the value is not finite.
    """
    if not math.isfinite(value):
        raise DivergedError(
            f"a finite {name}",
            found=f"{value} at step {step}",
            where="train",
            fix="lower train.lr or the coefficients of train.loss; the last checkpoint is from before this step",
        )
