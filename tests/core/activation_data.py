"""Numbers with the shapes that language models' activations have."""

import torch
from torch import Tensor

KINDS = ("normal", "student 3", "student 4, loud channels", "massive")
EVERY_LOUD, EVERY_MASSIVE, MASSIVE_CHANNEL = 97, 64, 5


def data(kind: str, n_tokens: int = 2048, layers: int = 2, width: int = 384, seed: int = 0) -> Tensor:
    """Activations of a kind, [token layer d_model]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, layers, width, generator=generator)
    if kind == "massive":
        x[::EVERY_MASSIVE, :, MASSIVE_CHANNEL] = 2000
    if kind.startswith("student"):
        # a normal over the root of a chi-square
        freedom = int(kind.split()[1].strip(","))
        chi = torch.randn(freedom, n_tokens, layers, width, generator=generator).square().sum(dim=0) / freedom
        x = x / chi.sqrt()
    if kind.endswith("loud channels"):
        x[:, :, ::EVERY_LOUD] *= 50
    return x
