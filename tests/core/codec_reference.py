"""The codecs again, in float64 and number by number, from what the head of core/codecs.py says about them.

Where a decision is so close that float32 may take it differently, the reference says so: comparisons skip those.
"""

import math
from dataclasses import dataclass

import numpy as np

CANDIDATES = {16: 2, 4: 5}
"""Scales tried with so many levels, each a step of the grid below the one before."""
CLOSE = 1e-3
"""How near to the edge between two codes counts as a tie, in steps."""


@dataclass
class Encoded:
    """Codes one number each, scales or shifts one a group, and which of them are beyond doubt."""

    codes: np.ndarray
    groups: np.ndarray
    sure_codes: np.ndarray
    sure_groups: np.ndarray


def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of ones that i and j share in binary, over the root of the size."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs, dtype=np.float64) / math.sqrt(size)


def rotated(u: np.ndarray, group: int) -> np.ndarray:
    """Each block of channels times H; blocks are the largest powers of two that divide a group."""
    block = 1
    while group % (2 * block) == 0:
        block *= 2
    out = np.empty_like(u)
    matrix = hadamard(block)
    for low in range(0, u.shape[-1], block):
        out[..., low : low + block] = u[..., low : low + block] @ matrix
    return out


def scale_of(code: int) -> float:
    return 2.0 ** ((code - 96) / 8)


def scale_code(largest: float, limit: float) -> tuple[int, bool]:
    """The least code whose scale makes `largest` at most `limit` steps, and whether that is beyond doubt."""
    if largest == 0:
        return 0, True
    exact = 8 * math.log2(largest / limit) + 96
    return min(max(math.ceil(exact), 0), 255), abs(exact - round(exact)) > CLOSE


def _int8(u: np.ndarray) -> tuple[list[int], int, list[bool], bool]:
    code, sure = scale_code(max(abs(u)), 127)
    steps = [value / scale_of(code) for value in u]
    codes = [min(max(round(step), -127), 127) for step in steps]
    return codes, code, [abs(abs(step - math.trunc(step)) - 0.5) > CLOSE for step in steps], sure


def _level_code(value: float, scale: float, levels: int) -> int:
    """Level c stands for (c + 1/2 - levels / 2) scale; the nearest one."""
    return min(max(math.floor(value / scale) + levels // 2, 0), levels - 1)


def _levels(u: np.ndarray, levels: int) -> tuple[list[int], int, list[bool], bool]:
    widest, sure = scale_code(max(abs(u)), levels / 2)
    tried = []
    for clipped in range(CANDIDATES[levels]):
        code = max(widest - clipped, 0)
        scale = scale_of(code)
        codes = [_level_code(value, scale, levels) for value in u]
        error = sum((value - (c + 0.5 - levels / 2) * scale) ** 2 for value, c in zip(u, codes, strict=True))
        tried.append((error, clipped, code, codes))
    best = min(tried)
    close = [entry for entry in tried if entry[2] != best[2] and entry[0] <= best[0] * (1 + CLOSE)]
    distances = [value / scale_of(best[2]) for value in u]
    return best[3], best[2], [abs(d - round(d)) > CLOSE for d in distances], sure and not close


def _steps(u: np.ndarray, step: float) -> tuple[list[int], int, list[bool], bool]:
    steps = [value / step for value in u]
    largest = max(abs(value) for value in steps)
    exact = math.log2(largest / 127) if largest else -1.0
    shift = max(math.ceil(exact), 0)
    steps = [value / 2**shift for value in steps]
    sure = abs(exact - round(exact)) > CLOSE
    return [round(s) for s in steps], shift, [abs(abs(s - math.trunc(s)) - 0.5) > CLOSE for s in steps], sure


def encode(name: str, x: np.ndarray, center: np.ndarray, scale: np.ndarray, step: np.ndarray, group: int) -> Encoded:
    """Codes of x [token, layer, channel]."""
    u = (x.astype(np.float64) - center) / scale
    levels = {"int4": 16, "int2": 4}.get(name)
    if levels:
        u = rotated(u, group)
    shape = (*u.shape[:2], u.shape[2] // group)
    found = Encoded(np.empty(u.shape, int), np.empty(shape, int), np.empty(u.shape, bool), np.empty(shape, bool))
    for token, layer, g in np.ndindex(*shape):
        part = slice(g * group, (g + 1) * group)
        values = u[token, layer, part]
        if name == "int8":
            one = _int8(values)
        elif levels:
            one = _levels(values, levels)
        else:
            one = _steps(values, float(step[layer]))
        found.codes[token, layer, part], found.groups[token, layer, g] = one[0], one[1]
        found.sure_codes[token, layer, part], found.sure_groups[token, layer, g] = one[2], one[3]
    found.sure_codes &= np.repeat(found.sure_groups, group, axis=2)
    return found


def decode(
    name: str,
    codes: np.ndarray,
    groups: np.ndarray,
    center: np.ndarray,
    scale: np.ndarray,
    step: np.ndarray,
    group: int,
) -> np.ndarray:
    """Activations from codes, one number each, and scales or shifts."""
    levels = {"int4": 16, "int2": 4}.get(name)
    u = np.empty(codes.shape)
    for token, layer, channel in np.ndindex(*codes.shape):
        code, shared = int(codes[token, layer, channel]), int(groups[token, layer, channel // group])
        if name == "int8":
            u[token, layer, channel] = code * scale_of(shared)
        elif levels:
            u[token, layer, channel] = (code - (7.5 if levels == 16 else 1.5)) * scale_of(shared)
        else:
            u[token, layer, channel] = code * float(step[layer]) * 2.0**shared
    if levels:
        u = rotated(u, group)
    return u * scale + center


def unpacked(name: str, packed: np.ndarray) -> np.ndarray:
    """One code a number from bytes: halves of a byte are d_model/2 channels apart, quarters d_model/4."""
    if name not in ("int4", "int2"):
        return packed.astype(int)
    count = {"int4": 2, "int2": 4}[name]
    n_bytes = packed.shape[2]
    codes = np.empty((*packed.shape[:2], n_bytes * count), int)
    for token, layer, j in np.ndindex(*packed.shape):
        bits = f"{int(packed[token, layer, j]):08b}"
        width = 8 // count
        for part in range(count):
            # the lowest bits are the last of the text
            text = bits[8 - (part + 1) * width : 8 - part * width]
            codes[token, layer, j + part * n_bytes] = int(text, 2)
    return codes
