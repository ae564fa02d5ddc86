"""How activations become stored numbers and back: tensor arithmetic alone, on any device.

With u = (x - center) / scale, constants per channel from stage calibrate (`Channels`):

| codec | arrays of one token | bits a number | restored u |
|---|---|---|---|
| float32 | values float32 [layer d_model] | 32 | x itself, exact |
| bf16 | values uint16 [layer d_model]: the bits of a bfloat16 | 16 | x itself, exact if the model ran in bfloat16 |
| int8 | codes int8 [layer d_model], scales uint8 [layer group] | 8 + 8/group | code s |
| int4 | codes uint8 [layer d_model/2], scales uint8 [layer group] | 4 + 8/group | H (code - 7.5) s |
| int2 | codes uint8 [layer d_model/4], scales uint8 [layer group] | 2 + 8/group | H (code - 1.5) s |
| entropy | codes int8 [layer d_model], shifts uint8 [layer group] | chosen | code step 2^shift |

Scales. A channel that is always large, or far from zero, would spend its neighbours' precision; u has neither. Center
and scale are quantiles, so that a few massive activations of a channel do not make all its other values coarse. Each
group of neighbouring channels of one token and layer shares one scale s = 2^((scales - 96) / 8), so that a massive
activation costs its own group only. With four and two bits s is the one of two or five candidates with the least
squared error: a slightly clipped group is often better than a wide step.

Rotation. With 16 or 4 levels the shape of a group matters. H is the orthonormal Hadamard matrix on blocks of channels
(as QuIP and QuaRot use it, Chee et al. 2023, Ashkboos et al. 2024): it makes every group nearly normal.

Packing. int4: the low half of a byte is channel j, the high half channel j + d_model/2. int2: the four pairs of bits,
lowest first, are channels j, j + d_model/4, j + d_model/2 and j + 3 d_model/4.

Entropy. Codes of a step that is constant per layer, followed by an entropy coder, come within 0.25 bit of what is
possible for normal numbers (Gish and Pierce 1968), because frequent codes get short words; a fixed grid spends the same
on all. `shifts` is 0 but for groups beyond 127 steps.
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from circuitmill.errors import ConfigError

CODECS = ("float32", "bf16", "int8", "int4", "int2", "entropy")
LIMIT = 127
"""Largest magnitude of an int8 code."""
LEVELS = {"int4": 16, "int2": 4}
SCALE_ZERO, SCALE_STEPS = 96, 8
"""scale = 2 ** ((code - SCALE_ZERO) / SCALE_STEPS): from 2^-12 to 2^19.9 in steps of 9%."""
_LARGEST_SCALE = 255
"""A group beyond it, 10^8 deviations, keeps signs and is cut to the largest code."""
_CANDIDATES = {"int4": 2, "int2": 5}
"""Scales tried: the largest magnitude fits, or is clipped to 0.92, 0.84, 0.77, 0.71 of itself."""
_BLOCK_VALUES = 2**18
"""Numbers in a block of work: 1 MB of float32. Blocks that leave the processor's cache take three times as long."""

Stored = dict[str, Shaped[Tensor, "token layer ..."]]


@dataclass(frozen=True, eq=False)
class Channels:
    """Constants of one place (inputs or outputs) of a model."""

    center: Float[Tensor, "layer d_model"]
    """Median."""
    scale: Float[Tensor, "layer d_model"]
    """Half the distance from the 16th to the 84th percentile, floored; never 0. A normal channel's deviation."""
    step: Float[Tensor, " layer"]
    """Step of codec entropy, in units of scale."""

    @classmethod
    def neutral(cls, n_layers: int, d_model: int) -> "Channels":
        """Constants that change nothing, for codecs that are exact."""
        one = torch.ones(n_layers, d_model)
        return cls(torch.zeros_like(one), one, one[:, 0])

    def to(self, device: torch.device) -> "Channels":
        """The same on another device."""
        return _on_device(self, device)

    @cached_property
    def per_scale(self) -> Float[Tensor, "layer d_model"]:
        """1 / scale."""
        return 1 / self.scale


@lru_cache(maxsize=16)
def _on_device(channels: Channels, device: torch.device) -> Channels:
    """Copied once, not with every batch."""
    return Channels(channels.center.to(device), channels.scale.to(device), channels.step.to(device))


@dataclass(frozen=True)
class Codec:
    """One way to store activations of one place; see the module."""

    name: str
    n_layers: int
    d_model: int
    group_channels: int = 0
    """Channels that share a scale; 0 for codecs without scales."""

    @property
    def exact(self) -> bool:
        """Whether numbers are stored as they are, without constants."""
        return self.name in ("float32", "bf16")

    @property
    def entropy_coded(self) -> bool:
        """Whether the codes are worth little without an entropy coder after them."""
        return self.name == "entropy"

    @property
    def rotation(self) -> int:
        """Channels in a block of the Hadamard rotation: the largest power of two in a group; 1 is none."""
        return self.group_channels & -self.group_channels if self.name in LEVELS else 1

    @property
    def block_rows(self) -> int:
        """Tokens that stay in the processor's cache while they are worked on."""
        return max(1, _BLOCK_VALUES // (self.n_layers * self.d_model))

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored arrays with one entry per token: name -> (dtype, shape of one token); the largest comes first."""
        full = (self.n_layers, self.d_model)
        if self.exact:
            return {"values": ("uint16" if self.name == "bf16" else "float32", full)}
        groups = (self.n_layers, self.d_model // self.group_channels)
        if self.name in LEVELS:
            packed = (self.n_layers, self.d_model // _per_byte(LEVELS[self.name]))
            return {"codes": ("uint8", packed), "scales": ("uint8", groups)}
        return {"codes": ("int8", full), "shifts" if self.name == "entropy" else "scales": ("uint8", groups)}

    def main_array(self) -> str:
        """The array whose chunk size is the one configured."""
        return next(iter(self.arrays()))

    def attributes(self) -> dict:
        """What a reader without this package must know, besides the arrays."""
        described: dict = {"codec": self.name}
        if not self.exact:
            described["group_channels"] = self.group_channels
        if self.name in LEVELS:
            described |= {"levels": LEVELS[self.name], "rotation": self.rotation}
        return described

    def encode(self, x: Float[Tensor, "token layer d_model"], channels: Channels) -> Stored:
        """Tensors to store for these activations, on their device."""
        rows = len(x) if x.is_cuda else self.block_rows
        parts = [self.encode_block(block, channels) for block in x.split(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.arrays()}

    def encode_block(self, x: Float[Tensor, "token layer d_model"], channels: Channels) -> Stored:
        """The same in one go; on a CPU fastest for `block_rows` tokens or fewer."""
        if self.name == "bf16":
            return {"values": x.to(torch.bfloat16).contiguous().view(torch.uint16)}
        if self.name == "float32":
            return {"values": x.to(torch.float32)}
        return self.encode_standardised(standardised(x, channels), channels)

    def encode_standardised(self, u: Float[Tensor, "token layer d_model"], channels: Channels) -> Stored:
        """The same from (x - center) / scale, for the codecs that are not exact. Overwrites `u`."""
        if self.name == "entropy":
            return self._encode_steps(u, channels)
        if self.name == "int8":
            grouped = u.unflatten(2, (-1, self.group_channels))
            scales = scale_codes(grouped.abs().amax(dim=3), float(LIMIT))
            grouped.mul_((1 / scale_values(scales)).unsqueeze(3)).round_()
            if bool((scales == _LARGEST_SCALE).any()):
                grouped.clamp_(-LIMIT, LIMIT)
            codes = grouped.to(torch.int8)
            return {"codes": codes.flatten(2), "scales": scales}
        return self._encode_levels(u)

    def _encode_steps(self, u: Tensor, channels: Channels) -> Stored:
        steps = u.mul_((1 / channels.step).unsqueeze(1)).unflatten(2, (-1, self.group_channels))
        largest = steps.abs().amax(dim=3)
        shifts = torch.log2(largest / LIMIT).ceil_().clamp_(0, 255)
        if bool((shifts > 0).any()):
            steps.mul_(torch.exp2(-shifts).unsqueeze(3))
        return {"codes": steps.round_().to(torch.int8).flatten(2), "shifts": shifts.to(torch.uint8)}

    def _encode_levels(self, u: Tensor) -> Stored:
        levels = LEVELS[self.name]
        if self.rotation > 1:
            u = (u.unflatten(2, (-1, self.rotation)) @ hadamard(self.rotation, u.device)).flatten(2)
        grouped = u.unflatten(2, (-1, self.group_channels))
        widest = scale_codes(grouped.abs().amax(dim=3), levels / 2)
        chosen, least, codes = widest, None, grouped
        for clipped in range(_CANDIDATES[self.name]):
            tried = (widest.to(torch.int16) - clipped).clamp_(min=0).to(torch.uint8)
            scale = scale_values(tried).unsqueeze(3)
            # level c stands for (c + 0.5 - levels / 2) scale
            steps = grouped * (1 / scale)
            now = steps.floor().clamp_(-levels // 2, levels // 2 - 1)
            error = steps.sub_(now).sub_(0.5).square_().sum(dim=3).mul_(scale.squeeze(3).square())
            if least is None:
                least, codes = error, now
                continue
            better = error < least
            chosen, least = torch.where(better, tried, chosen), torch.minimum(error, least)
            # codes + better (now - codes) on small whole numbers, so exact: several times faster than torch.where with
            # a condition per group, as a conversion to int8 is than one to uint8
            codes.add_(now.sub_(codes).mul_(better.to(torch.float32).unsqueeze(3)))
        codes = codes.flatten(2).add_(levels // 2).to(torch.int8).view(torch.uint8)
        return {"codes": _pack(codes, levels), "scales": chosen}

    def decode(self, stored: Stored, channels: Channels) -> Float[Tensor, "token layer d_model"]:
        """Activations in float32, on the device of what is stored."""
        values = stored[self.main_array()]
        x = torch.empty((len(values), self.n_layers, self.d_model), dtype=torch.float32, device=values.device)
        rows = max(1, len(x)) if values.is_cuda else self.block_rows
        for low in range(0, len(x), rows):
            block = slice(low, low + rows)
            self._decode_into(x[block], {name: value[block] for name, value in stored.items()}, channels)
        return x

    def _decode_into(self, x: Float[Tensor, "token layer d_model"], stored: Stored, channels: Channels) -> None:
        if self.name == "bf16":
            x.copy_(stored["values"].view(torch.bfloat16))
            return
        if self.name == "float32":
            x.copy_(stored["values"])
            return
        grouped = x.unflatten(2, (-1, self.group_channels))
        if self.name == "entropy":
            x.copy_(stored["codes"]).mul_(channels.step.unsqueeze(1))
            if bool(stored["shifts"].any()):
                grouped.mul_(torch.exp2(stored["shifts"].to(torch.float32)).unsqueeze(3))
        elif self.name == "int8":
            x.copy_(stored["codes"])
            grouped.mul_(scale_values(stored["scales"]).unsqueeze(3))
        else:
            levels = LEVELS[self.name]
            _unpack_into(x, stored["codes"], levels)
            x.add_(0.5 - levels / 2)
            grouped.mul_(scale_values(stored["scales"]).unsqueeze(3))
            if self.rotation > 1:
                blocks = x.unflatten(2, (-1, self.rotation))
                x.copy_((blocks @ hadamard(self.rotation, x.device)).flatten(2))
        x.mul_(channels.scale).add_(channels.center)


@dataclass(frozen=True)
class Encoded:
    """Activations of some tokens as they are stored; `decode` restores them where the numbers are."""

    codec: Codec
    channels: Channels
    arrays: Stored

    def __len__(self) -> int:
        return len(self.arrays[self.codec.main_array()])

    def to(self, device: torch.device) -> "Encoded":
        """The same on another device: what travels are the codes."""
        arrays = {name: value.to(device, non_blocking=True) for name, value in self.arrays.items()}
        return Encoded(self.codec, self.channels.to(device), arrays)

    def pinned(self) -> "Encoded":
        """The same in memory from which a GPU copies by itself."""
        return Encoded(self.codec, self.channels, {name: value.pin_memory() for name, value in self.arrays.items()})

    def decode(self) -> Float[Tensor, "token layer d_model"]:
        """Activations in float32."""
        return self.codec.decode(self.arrays, self.channels)


@dataclass(frozen=True)
class StoredBatch:
    """MLP inputs and outputs of the same tokens, as they are stored."""

    inputs: Encoded
    outputs: Encoded | None
    """None if outputs are computed from the inputs (`cache.targets: recomputed`)."""

    def pinned(self) -> "StoredBatch":
        """The same in memory from which a GPU copies by itself."""
        return StoredBatch(self.inputs.pinned(), None if self.outputs is None else self.outputs.pinned())


def plain_batch(
    inputs: Float[Tensor, "token layer d_model"], outputs: Float[Tensor, "token layer d_model"]
) -> StoredBatch:
    """Activations that were never stored, in the form that the trainer takes."""
    _, n_layers, d_model = inputs.shape
    codec = Codec("float32", n_layers, d_model)
    channels = Channels.neutral(n_layers, d_model)
    return StoredBatch(Encoded(codec, channels, {"values": inputs}), Encoded(codec, channels, {"values": outputs}))


def make_codec(name: str, n_layers: int, d_model: int, group_channels: int) -> Codec:
    """A codec for a model's shape.

    Args:
        group_channels: Channels that share a scale; more than d_model means all of them.

    Raises:
        ConfigError: the groups do not divide the channels evenly, or too few channels to pack.
    """
    if name in ("float32", "bf16"):
        return Codec(name, n_layers, d_model)
    group = min(group_channels, d_model)
    if d_model % group:
        raise ConfigError(
            f"a divisor of d_model ({d_model})",
            found=str(group_channels),
            where="cache.group_channels",
            fix="choose 16, 32, 64 or 128, whichever divides it",
        )
    if name in LEVELS and d_model % _per_byte(LEVELS[name]):
        raise ConfigError(
            f"a d_model that is a multiple of {_per_byte(LEVELS[name])} for codec {name}",
            found=str(d_model),
            where="cache.codec",
            fix="choose int8 or entropy",
        )
    return Codec(name, n_layers, d_model, group)


def standardised(
    x: Float[Tensor, "token layer d_model"],
    channels: Channels,
    out: Float[Tensor, "token layer d_model"] | None = None,
) -> Float[Tensor, "token layer d_model"]:
    """(x - center) / scale, in float32 and contiguous.

    Args:
        x: Activations.
        channels: The constants.
        out: Where to; None for new memory.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return torch.sub(x, channels.center, out=out).mul_(channels.per_scale)


def scale_codes(largest: Float[Tensor, "..."], limit: float) -> UInt8[Tensor, "..."]:
    """The least stored scale with which `largest` is at most `limit` steps."""
    codes = torch.log2(largest * (1 / limit)).mul_(SCALE_STEPS).ceil_().add_(SCALE_ZERO)
    return codes.clamp_(0, _LARGEST_SCALE).to(torch.uint8)


def scale_values(codes: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scales from their stored form: 2 ** ((code - SCALE_ZERO) / SCALE_STEPS)."""
    return torch.exp2((codes.to(torch.float32) - SCALE_ZERO) / SCALE_STEPS)


@cache
def hadamard(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """The orthonormal, symmetric Hadamard matrix of Sylvester's construction; its own inverse.

    Args:
        size: A power of two.
    """
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def _per_byte(levels: int) -> int:
    return 2 if levels == 16 else 4


def _pack(codes: UInt8[Tensor, "token layer d_model"], levels: int) -> UInt8[Tensor, "token layer byte"]:
    count = _per_byte(levels)
    bits = 8 // count
    parts = codes.chunk(count, dim=2)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << (bits * index)
    return packed


def _unpack_into(
    x: Float[Tensor, "token layer d_model"], packed: UInt8[Tensor, "token layer byte"], levels: int
) -> None:
    count = _per_byte(levels)
    bits = 8 // count
    for index, part in enumerate(x.chunk(count, dim=2)):
        part.copy_((packed >> (bits * index)) & (levels - 1))
