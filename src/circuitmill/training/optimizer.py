"""The optimizer: Adam with float32 moments."""

import torch

from circuitmill.config.train import TrainConfig
from circuitmill.core.transcoder import Transcoder


def make_adam(transcoder: Transcoder, cfg: TrainConfig) -> torch.optim.Adam:
    """Adam over all parameters, in one fused pass; parameters and both moments are float32."""
    return torch.optim.Adam(
        transcoder.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
