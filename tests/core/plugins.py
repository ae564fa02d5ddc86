"""What somebody else's package may hold: a nonlinearity, a term of the loss, and something that is neither."""

import torch
from torch import Tensor

from circuitmill.config.train import TermConfig
from circuitmill.core.losses import Evaluation
from circuitmill.core.nonlinearity import Settings

NUMBER = 3


def above_half(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    """Keep what is above 1/2."""
    return torch.where(pre > 0.5, pre, 0.0)


def squared_activations(batch: Evaluation, term: TermConfig) -> Tensor:
    """Sum of squares of activations times a scale, averaged over tokens."""
    return (term.scale or 1.0) * torch.stack([a.total(torch.square) for a in batch.a]).sum() / batch.n_tokens
