"""Stochastic rounding to bfloat16, and random numbers that follow from what they are for."""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def number_of(purpose: str) -> int:
    """A number from 0 to below 2^56 that follows from a text."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=7).digest(), "little")


def generator_at(seed: str, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one step: the same on all ranks, and after resuming."""
    return torch.Generator(device).manual_seed(number_of(f"{seed}/{step}"))


def uniform_bits(shape: torch.Size, generator: torch.Generator) -> Int[Tensor, "..."]:
    """Integers from 0 to below 2^16, for `rounded`."""
    # four to a drawn number: drawing is what takes time
    drawn = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=generator.device)
    drawn.random_(-(1 << 63), None, generator=generator)
    return drawn.view(torch.int16)[: shape.numel()].view(shape).int().bitwise_and_((1 << 16) - 1)


def rounded(values: Float[Tensor, "..."], noise: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bfloat16 neighbours of float32 numbers: away from zero where noise and what is cut off make 2^16 or more."""
    # a bfloat16 is the upper half of a float32; a uniform number below one unit of that half carries over into it
    # with the probability that the lower half stands for, away from zero for both signs
    bits = values.contiguous().view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()


@torch.no_grad()
def round_stochastically(values: Float[Tensor, "..."], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Bfloat16 neighbours of float32 numbers, the nearer the likelier, so that the expected value is the number.

    >>> exact = torch.tensor([1.0, -2.5, 0.0])
    >>> torch.equal(round_stochastically(exact, torch.Generator()), exact.bfloat16())
    True
    """
    return rounded(values, uniform_bits(values.shape, generator))
