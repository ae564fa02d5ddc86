"""How activations become stored numbers and back.

| codec | arrays of one token | restored value |
|---|---|---|
| int8 | codes int8 [layer d_model], scales float16 [layer group] | code x scale x channel_scale |
| bf16 | values uint16 [layer d_model]: the bits of a bfloat16 | exact, if the model ran in bfloat16 |
| float32 | values float32 [layer d_model] | exact |

int8: a channel that is always large would spend its neighbours' precision, so each channel is first divided by its
own root mean square, taken from the first tokens of the shard (`channel_scale`, constant in the shard). Each group of
neighbouring channels of one token and layer then shares one scale, largest magnitude / 127.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from circuitmill.errors import ConfigError, StoreError

LIMIT = 127
_BLOCK_VALUES = 2**18
"""Numbers in a block of work: 1 MB of float32. Blocks that leave the cache take three times as long."""
_CHANNEL_FLOOR = 0.25
"""Least channel scale, in units of the layer's median: a channel quiet in the calibration tokens that bursts later
then costs its group a few bits at that token instead of all of them."""


@dataclass(frozen=True)
class Codec:
    """One way to store activations of one place (inputs or outputs)."""

    name: str
    n_layers: int
    d_model: int
    group_channels: int = 0
    """Channels that share a scale; 0 for codecs without scales."""

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored arrays with one entry per token: name -> (dtype, shape of one token)."""
        full = (self.n_layers, self.d_model)
        if self.name == "int8":
            groups = self.d_model // self.group_channels
            return {"codes": ("int8", full), "scales": ("float16", (self.n_layers, groups))}
        return {"values": ("uint16" if self.name == "bf16" else "float32", full)}

    def main_array(self) -> str:
        """The array whose chunk size is the one configured."""
        return next(iter(self.arrays()))

    def attributes(self) -> dict:
        """What a reader without this package must know, besides the arrays."""
        if self.name == "int8":
            return {"codec": "int8", "group_channels": self.group_channels, "limit": LIMIT}
        return {"codec": self.name}

    def encode(
        self, x: Float[Tensor, "token layer d_model"], channel: Float[Tensor, "layer d_model"] | None
    ) -> dict[str, Shaped[Tensor, "token layer ..."]]:
        """Tensors to store for these activations.

        Args:
            channel: Scale of each channel, for int8.
        """
        if self.name == "int8":
            parts = [self._encode_int8(block, channel) for block in x.split(self.block_rows)]
            return {name: torch.cat([part[name] for part in parts]) for name in self.arrays()}
        if self.name == "bf16":
            return {"values": x.to(torch.bfloat16).contiguous().view(torch.uint16)}
        return {"values": x.to(torch.float32)}

    def _encode_int8(self, x: Tensor, channel: Tensor | None) -> dict[str, Tensor]:
        if channel is None:
            raise StoreError("channel scales for codec int8", found="none", where="encode", fix="calibrate first")
        # einops: x / channel, "token layer (group member) -> token layer group member"
        grouped = (x.to(torch.float32) / channel).unflatten(2, (-1, self.group_channels))
        scales = (grouped.abs().amax(dim=3) / LIMIT).to(torch.float16)
        steps = scales.to(torch.float32)
        # a group of zeros, or so small that its scale is below float16: codes 0
        inverse = torch.where(steps > 0, 1 / steps, 0)
        codes = grouped.mul_(inverse.unsqueeze(3)).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)
        return {"codes": codes.flatten(2), "scales": scales}

    def decode(
        self,
        stored: dict[str, Shaped[Tensor, "token layer ..."]],
        channel: Float[Tensor, "layer d_model"] | None,
    ) -> Float[Tensor, "token layer d_model"]:
        """Activations in float32 from what is stored.

        Args:
            channel: Scale of each channel, for int8; None leaves that factor to the caller.
        """
        n_tokens = len(stored[self.main_array()])
        x = torch.empty((n_tokens, self.n_layers, self.d_model), dtype=torch.float32)
        for low in range(0, n_tokens, self.block_rows):
            block = slice(low, low + self.block_rows)
            self.decode_into(x[block], {name: value[block] for name, value in stored.items()}, channel)
        return x

    def decode_into(
        self,
        x: Float[Tensor, "token layer d_model"],
        stored: dict[str, Shaped[Tensor, "token layer ..."]],
        channel: Float[Tensor, "layer d_model"] | None,
    ) -> None:
        """The same, into a tensor that is there; fastest for `block_rows` tokens or fewer."""
        if self.name == "bf16":
            x.copy_(stored["values"].view(torch.bfloat16))
            return
        x.copy_(stored[self.main_array()])
        if self.name == "int8":
            x.unflatten(2, (-1, self.group_channels)).mul_(stored["scales"].to(torch.float32).unsqueeze(3))
            if channel is not None:
                x.mul_(channel)

    @property
    def block_rows(self) -> int:
        """Tokens that stay in the processor's cache while they are worked on."""
        return max(1, _BLOCK_VALUES // (self.n_layers * self.d_model))


def make_codec(name: str, n_layers: int, d_model: int, group_channels: int) -> Codec:
    """A codec for a model's shape.

    Args:
        group_channels: Channels that share a scale; more than d_model means all of them.

    Raises:
        ConfigError: the groups do not divide the channels evenly.
    """
    if name != "int8":
        return Codec(name, n_layers, d_model)
    group = min(group_channels, d_model)
    if d_model % group:
        raise ConfigError(
            f"a divisor of d_model ({d_model})",
            found=str(group_channels),
            where="cache.group_channels",
            fix="choose 16, 32, 64 or 128, whichever divides it",
        )
    return Codec(name, n_layers, d_model, group)


def channel_scales(x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "layer d_model"]:
    """Root mean square of each channel, at least a quarter of the layer's median; 1 in a layer of zeros.

    Args:
        x: Calibration tokens.
    """
    rms = x.to(torch.float32).square().mean(dim=0).sqrt()
    floor = _CHANNEL_FLOOR * rms.median(dim=1, keepdim=True).values
    scales = torch.maximum(rms, floor)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def to_numpy(x: Shaped[Tensor, "..."]) -> Shaped[np.ndarray, "..."]:
    """A stored tensor as an array in host memory."""
    return x.contiguous().cpu().numpy()
