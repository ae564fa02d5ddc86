"""Data parallelism: every rank works on its slice of each batch, and all ranks end each step with the same numbers.

Losses are means over tokens and all slices are equally long, so the mean of the ranks' gradients is the
gradient of the whole batch. With one rank nothing is communicated and torch.distributed need not be
initialised.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from circuitmill.core.metrics import ExplainedVariance
from circuitmill.distributed import Ranks
from circuitmill.errors import ConfigError


def batch_slice(batch_tokens: int, ranks: Ranks) -> slice:
    """The rows of a batch that this rank works on.

    >>> batch_slice(8, Ranks(rank=1, size=2, local_rank=1))
    slice(4, 8, None)

    Raises:
        ConfigError: the batch cannot be shared equally.
    """
    if batch_tokens % ranks.size:
        raise ConfigError(
            f"a multiple of the number of ranks ({ranks.size})",
            found=batch_tokens,
            where="train.batch_tokens",
            fix="choose a batch that the ranks can share equally",
        )
    share = batch_tokens // ranks.size
    return slice(ranks.rank * share, (ranks.rank + 1) * share)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its mean over ranks, in one collective over all parameters together."""
    if ranks.size == 1:
        return
    parameters = list(parameters)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks.size
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def average(values: Shaped[Tensor, "..."], ranks: Ranks) -> Shaped[Tensor, "..."]:
    """The mean over ranks of floating-point values."""
    if ranks.size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / ranks.size


@torch.no_grad()
def gather_rows(rows: Shaped[Tensor, "token ..."], ranks: Ranks) -> Shaped[Tensor, "all_tokens ..."]:
    """The rows of all ranks, first rank first; every rank must have as many."""
    if ranks.size == 1:
        return rows
    whole = rows.new_empty((ranks.size * len(rows), *rows.shape[1:]))
    dist.all_gather(list(whole.chunk(ranks.size)), rows.contiguous())
    return whole


@torch.no_grad()
def total(counts: Int[Tensor, "..."], ranks: Ranks) -> Int[Tensor, "..."]:
    """The sum over ranks."""
    if ranks.size == 1:
        return counts
    counts = counts.clone()
    dist.all_reduce(counts)
    return counts


@torch.no_grad()
def least(values: Float[Tensor, "..."], ranks: Ranks) -> Float[Tensor, "..."]:
    """The smallest over ranks."""
    if ranks.size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


@torch.no_grad()
def merge_explained_variance(own: ExplainedVariance, ranks: Ranks) -> ExplainedVariance:
    """What one accumulator over the tokens of all ranks would hold, merged in the order of ranks."""
    if ranks.size == 1:
        return own
    counts = torch.tensor([own.n_tokens], dtype=torch.float64, device=own.mean.device)
    state = torch.cat([counts, own.mean.flatten(), own.deviation, own.error])
    states = [torch.empty_like(state) for _ in range(ranks.size)]
    dist.all_gather(states, state)
    n_layers, d_model = own.mean.shape
    merged = ExplainedVariance(n_layers, d_model, device=own.mean.device)
    for other in states:
        part = ExplainedVariance(n_layers, d_model, device=own.mean.device)
        count, mean, part.deviation, part.error = other.split([1, n_layers * d_model, n_layers, n_layers])
        part.n_tokens, part.mean = int(count), mean.view(n_layers, d_model)
        merged.merge(part)
    return merged


def wait_for_all(ranks: Ranks) -> None:
    """Return when every rank has come to this line."""
    if ranks.size > 1:
        dist.barrier()
