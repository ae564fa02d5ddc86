"""Everything that a training needs to go on: parameters, Adam's moments, step, dead counters, random state."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.training.optimizer import make_adam

_MOMENTS = {"adam_mean": "exp_avg", "adam_square": "exp_avg_sq", "adam_step": "step"}


@dataclass
class TrainState:
    """A training between two steps. The position in the data is the step: batches are addressed by index."""

    transcoder: Transcoder
    """In normalised units."""
    optimizer: torch.optim.Adam
    idle: Int[Tensor, "layer feature"]
    """Tokens since each feature last fired, over all ranks."""
    step: int = 0
    """Finished steps."""

    def dead(self, after: int) -> Bool[Tensor, "layer feature"]:
        """Features that have not fired for at least `after` tokens."""
        return self.idle >= after

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors on the CPU, for a checkpoint."""
        named = {
            "idle": self.idle.cpu(),
            "random_state": torch.get_rng_state(),
            "step": torch.tensor(self.step),
        }
        for name, parameter in self.transcoder.named_parameters():
            named[f"parameter.{name}"] = parameter.detach().cpu()
            for ours, theirs in _MOMENTS.items():
                if parameter in self.optimizer.state:
                    named[f"{ours}.{name}"] = self.optimizer.state[parameter][theirs].cpu()
        return named

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same configuration.

        Raises:
            ShapeError: the checkpoint is of a transcoder of another shape.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self.transcoder.named_parameters()):
            saved = tensors.get(f"parameter.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ShapeError(
                    f"{name} of shape {tuple(parameter.shape)}",
                    found="nothing" if saved is None else str(tuple(saved.shape)),
                    where=f"checkpoint, parameter.{name}",
                    fix="remove the checkpoints of the other configuration",
                )
            parameter.copy_(saved)
            moments[index] = {theirs: tensors[f"{ours}.{name}"] for ours, theirs in _MOMENTS.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.idle.copy_(tensors["idle"])
        self.step = int(tensors["step"])
        torch.set_rng_state(tensors["random_state"])


def start(
    cfg: TrainConfig, x: Float[Tensor, "token layer d_model"], y: Float[Tensor, "token layer d_model"]
) -> TrainState:
    """A transcoder with starting values and a fresh optimizer.

    Args:
        cfg: Seed, sizes and kinds of start.
        x: Normalised MLP inputs of the first batch, from which data-driven starting values are taken.
        y: Normalised MLP outputs of the same tokens.
    """
    _, n_layers, d_model = x.shape
    transcoder = Transcoder(n_layers, cfg.n_features, d_model, device=x.device)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    init.uniform(transcoder, threshold=cfg.init.threshold, generator=generator)
    if cfg.init.encoder_bias == "firing_rate":
        init.encoder_bias_for_rate(transcoder, x, rate=cfg.init.l0 / cfg.n_features)
    if cfg.init.decoder_bias == "mean":
        init.decoder_bias_from_mean(transcoder, y.mean(dim=0))
    idle = torch.zeros(n_layers, cfg.n_features, dtype=torch.int64, device=x.device)
    return TrainState(transcoder, make_adam(transcoder, cfg), idle)
