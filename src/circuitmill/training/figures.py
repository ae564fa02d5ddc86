"""What every rank has to know of a step, in one collective; the same numbers on all of them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.losses import PARTIAL
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.training.objective import BatchResult
from circuitmill.training.parallel.collectives import Group
from circuitmill.training.parallel.layout import Layout


@dataclass(frozen=True)
class Figures:
    """Of one step, over all tokens of its batch and all features."""

    terms: dict[str, float]
    """Unweighted terms of the loss."""
    loss: float
    grad_norm: float
    """Before clipping, over all parameters."""
    l0: Float[Tensor, " source"]
    """Mean number of features that fire on a token."""
    least: Float[Tensor, " source"]
    """The smallest activation above zero; infinity if there is none."""
    n_dead: int
    """Features that have not fired for long."""
    stopping: bool
    """Whether any rank was asked to stop."""


def figures_of(
    result: BatchResult, layout: Layout, *, squares: Float[Tensor, "2"], n_dead: int, asked: bool
) -> Figures:
    """Put together what the ranks found.

    Args:
        result: Of this rank.
        layout: Of the ranks.
        squares: Squared norms of this rank's gradients: of what it alone has, and of what others have too.
        n_dead: Of this rank's features.
        asked: Whether this rank was asked to stop.
    """
    names, n_sources = list(result.terms), len(result.least)
    kept = result.firings.sum(dim=1)
    device = result.y_hat.device
    own = torch.cat(
        [
            *(value.double().view(1) for each in (result.terms, result.weighted) for value in each.values()),
            squares.to(device),
            torch.tensor([n_dead, asked, len(result.y)], dtype=torch.float64, device=device),
            kept.double(),
            result.least.double(),
        ]
    )
    by_rank = layout.world.gather(own).cpu().unflatten(0, (layout.data.size, layout.features.size))
    sizes = [len(names), len(names), 1, 1, 1, 1, 1, n_sources, n_sources]
    terms, weighted, divided, shared, dead, asks, tokens, fired, least = by_rank.split(sizes, dim=2)
    partial = torch.tensor([result.kinds[name] in PARTIAL for name in names])
    # sums over features are sums over shards, all else is the same on ranks with the same tokens
    term_means, weighted_means = (
        torch.where(partial, each.sum(dim=1), each[:, 0]).mean(dim=0) for each in (terms, weighted)
    )
    # of fsdp each data rank has a part, of all others the same
    apart = divided.sum() if layout.strategy == "fsdp" else divided[0].sum()
    return Figures(
        terms=dict(zip(names, term_means.tolist(), strict=True)),
        loss=weighted_means.sum().item(),
        grad_norm=math.sqrt(apart.item() + shared[0, 0].item()),
        l0=(fired.sum(dim=(0, 1)) / tokens[:, 0].sum()).to(device),
        least=least.amin(dim=(0, 1)).to(device, result.least.dtype),
        n_dead=int(dead[0].sum()),
        stopping=bool(asks.any()),
    )


def merge_explained_variance(own: ExplainedVariance, group: Group) -> ExplainedVariance:
    """What one accumulator over the tokens of all ranks would hold, merged in the order of ranks."""
    if group.size == 1:
        return own
    counts = torch.tensor([own.n_tokens], dtype=torch.float64, device=own.mean.device)
    n_layers, d_model = own.mean.shape
    merged = ExplainedVariance(n_layers, d_model, device=own.mean.device)
    for other in group.gather(torch.cat([counts, own.mean.flatten(), own.deviation, own.error])):
        part = ExplainedVariance(n_layers, d_model, device=own.mean.device)
        count, mean, part.deviation, part.error = other.split([1, n_layers * d_model, n_layers, n_layers])
        part.n_tokens, part.mean = int(count), mean.view(n_layers, d_model)
        merged.merge(part)
    return merged
