"""Deterministic pseudo-random numbers and text keys, as functions of integers alone.

A sample chosen by hash does not depend on the order of reading, on batches or on the number of processes.
Arithmetic is modulo 2^64 in int64, which wraps.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(x: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Scramble integers so that every bit of the result depends on every bit of the argument.

    The finaliser of splitmix64 (Steele, Lea and Flood 2014): one to one, hence free of collisions.

    >>> mix(torch.tensor([0, 1, 2])).unique().numel()
    3
    """
    # int64 shifts keep the sign; the masks make them logical shifts
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(x: Int[Tensor, " token"], seed: int) -> Float[Tensor, " token"]:
    """A number in [0, 1) for every integer, in float64; another seed gives an unrelated one.

    >>> bool((uniform(torch.arange(1000), seed=1) < 0.5).sum() > 400)
    True
    """
    scrambled = mix(mix(x + _signed(_BASE * (2 * seed + 1))))
    return ((scrambled >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def text_keys(token_id: Int[Tensor, " token"], starts: Bool[Tensor, " token"], length: int) -> Int[Tensor, " token"]:
    """A hash of the text that ends at each token.

    That text is up to `length` tokens, none from before the document's start. Keys are equal if and (but for
    accidents of probability 2^-64) only if the texts are. The key is the polynomial sum of mix(token_i + 1) *
    base^(i - first), found for all tokens at once from one running sum.

    >>> starts = torch.tensor([True, False, False, True, False, False])
    >>> key = text_keys(torch.tensor([5, 6, 7, 5, 6, 8]), starts, length=8)
    >>> (key[:3] == key[3:]).tolist()
    [True, True, False]

    Args:
        token_id: Of whole documents, one after the other.
        starts: True at the first token of a document or of a sequence; the first entry counts as one anyway.
        length: How far back to look, in tokens.
    """
    n_tokens = token_id.shape[0]
    index = torch.arange(n_tokens, device=token_id.device)
    powers = _powers(_BASE, n_tokens, token_id.device)
    inverse = _powers(pow(_BASE, -1, 1 << 64), n_tokens, token_id.device)
    # + 1 because mix(0) = 0, which would not count
    total = (mix(token_id.long() + 1) * powers).cumsum(0)
    document = torch.where(starts, index, 0).cummax(0).values
    first = torch.maximum(document, index - length + 1)
    before = torch.where(first > 0, total[(first - 1).clamp_min(0)], 0)
    return mix((total - before) * inverse[first])


def _powers(base: int, n_tokens: int, device: torch.device) -> Int[Tensor, " token"]:
    factors = torch.full((n_tokens,), _signed(base), dtype=torch.int64, device=device)
    factors[:1] = 1
    return factors.cumprod(0)
