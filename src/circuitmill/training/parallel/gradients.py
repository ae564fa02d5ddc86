"""Gradients over ranks: their mean over tokens, their sum where shards share a parameter, and their norm."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from circuitmill.training.parallel.collectives import Group
from circuitmill.training.parallel.layout import Layout

BUCKET = 1 << 28
"""Numbers that are sent together, so that the copy of gradients that is sent stays at 1 GiB."""


def local(values: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return values.to_local() if isinstance(values, DTensor) else values


@torch.no_grad()
def reduce_gradients(
    names: Mapping[nn.Parameter, str], counts: Float[Tensor, " _"], layout: Layout
) -> Float[Tensor, " _"]:
    """Make every gradient that of the whole batch and of all features, in place.

    Args:
        names: Parameters with their names; each gets a gradient, zero if it has none.
        counts: Float32; travels with the gradients.
        layout: Of the training. fully_shard has reduced gradients already.

    Returns:
        The sum of the counts over ranks that have other tokens.
    """
    for parameter in names:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if layout.features.size > 1:
        shared = [p for p, name in names.items() if name in shared_inside(names.values())]
        _add(layout.features, [p.grad for p in shared if p.grad is not None])
    if layout.data.size == 1:
        return counts
    counts = counts.clone()
    if layout.strategy == "fsdp":
        return layout.data.add_(counts)
    gradients = [p.grad for p in names if p.grad is not None]
    _add(layout.data, [*gradients, counts])
    torch._foreach_div_(gradients, layout.data.size)
    return counts


def shared_inside(names: Iterable[str]) -> set[str]:
    """Parameters that all features share and that act before the sum over them: a shard has a part of the gradient.

    They are the second halves P of low-rank decoders. Decoder biases and the skip connection act after the sum.
    """
    return {name for name in names if name.startswith("decoder.") and name.rpartition(".")[2] == "P"}


def _add(group: Group, tensors: list[Tensor]) -> None:
    """Replace tensors by their sums over ranks: those of one type together, in order, a bucket at a time."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in [tensor for tensor in tensors if tensor.dtype == dtype]:
            if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
                _add_bucket(group, bucket)
                bucket = []
            bucket.append(tensor)
        _add_bucket(group, bucket)


def _add_bucket(group: Group, tensors: list[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        group.add_(tensors[0])
        return
    flat = group.add_(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def squares(names: Mapping[nn.Parameter, str], divided: Callable[[str], bool]) -> Float[Tensor, "2"]:
    """Squared norms of the gradients that are here: of parameters of which each rank has its own, and of all others.

    Args:
        names: Parameters with their names.
        divided: Whether ranks have other parts of the parameter of this name.
    """
    found = []
    for own in (True, False):
        gradients = [
            local(p.grad) for p, name in names.items() if p.grad is not None and divided(name) is own and p.grad.numel()
        ]
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
        found.append(torch.stack([norm.double() for norm in norms]).square().sum())
    return torch.stack([each.to(found[0].device) for each in found])
