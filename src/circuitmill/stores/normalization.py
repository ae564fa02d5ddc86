"""First and second moments of activations: taken while they are written, merged over shards, turned into scales.

`moments.safetensors` (a shard) and `normalization.safetensors` (all train shards) hold float64 tensors

    count              []               tokens
    input_mean         [layer d_model]  mean of the unquantised MLP inputs
    input_m2           [layer d_model]  sum of squared deviations from that mean
    input_sum_squares  [layer]          sum over tokens of ||x||^2
    output_mean, output_m2, output_sum_squares: the same for MLP outputs

and the latter also `input_scale` and `output_scale` [layer], the factors s with E||s x||^2 = d_model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from circuitmill.core.codecs import Channels
from circuitmill.core.scaling import Scaling
from circuitmill.errors import ConfigError, DivergedError, StoreError
from circuitmill.stores.files import atomic_write

_BLOCK_VALUES = 2**18
"""Numbers that are summed in float32; also what stays in the processor's cache."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per layer and channel."""

    count: int
    mean: Float64[Tensor, "layer d_model"]
    m2: Float64[Tensor, "layer d_model"]

    @property
    def sum_squares(self) -> Float64[Tensor, " layer"]:
        """Sum over tokens of ||x||^2 = sum over channels of m2 + count mean^2."""
        return (self.m2 + self.count * self.mean.square()).sum(dim=1)

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both sets of tokens together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)


class MomentSums:
    """Moments of activations that arrive block by block, from the standardised form that codecs make anyway.

    With u = (x - center) / scale: sums of u and u^2, in float32 within a block and in float64 over blocks. As u is
    about normal, nothing is lost by subtraction at the end.

    Args:
        channels: The constants that u was made with.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels, self._count = channels, 0
        self._first = torch.zeros(channels.center.shape, dtype=torch.float64)
        self._second = torch.zeros_like(self._first)

    def add(
        self, u: Float[Tensor, "token layer d_model"], spare: Float[Tensor, "token layer d_model"] | None = None
    ) -> None:
        """Count in one block, of at most a few thousand tokens.

        Args:
            u: The block.
            spare: Memory of its shape for what lies between; new memory costs a page fault every 4 KB.
        """
        self._count += len(u)
        # as float32 into the float64 sums: the same numbers as after a conversion, with fewer steps
        self._first += u.sum(dim=0).cpu()
        self._second += torch.square(u, out=spare).sum(dim=0).cpu()

    def moments(self, what: str) -> Moments:
        """Moments of x.

        Args:
            what: "input" or "output", for the message.

        Raises:
            DivergedError: an activation is not finite.
        """
        finite = torch.isfinite(self._second).all(dim=1)
        if not bool(finite.all()):
            layers = [index for index, good in enumerate(finite.tolist()) if not good]
            raise DivergedError(
                f"finite MLP {what}s",
                found="NaN or infinity",
                where=f"layer {', '.join(map(str, layers))} of the model",
                fix="run the model in float32 (model.dtype) or check its weights",
            )
        center, scale = self._channels.center.double().cpu(), self._channels.scale.double().cpu()
        shift = self._first / self._count
        m2 = scale.square() * (self._second - self._count * shift.square()).clamp(min=0)
        return Moments(self._count, center + scale * shift, m2)


def moments_of(x: Float[Tensor, "token layer d_model"], what: str) -> Moments:
    """Moments of some activations, of which nothing is known: in float32 within blocks of tokens, merged in float64.

    Args:
        what: "input" or "output", for the message.

    Raises:
        DivergedError: an activation is not finite.
    """
    neutral = Channels.neutral(*x.shape[1:]).to(x.device)
    rows = max(1, _BLOCK_VALUES // x[0].numel())
    parts = []
    for block in x.split(rows):
        # about the block's own mean, so that a large mean costs no precision
        own = replace(neutral, center=block.to(torch.float32).mean(dim=0))
        sums = MomentSums(own)
        sums.add(block.to(torch.float32) - own.center)
        parts.append(sums.moments(what))
    return reduce(Moments.merged, parts)


@dataclass(frozen=True)
class Normalization:
    """What training divides by: one factor per layer and side; and mean and standard deviation of every dimension."""

    input_scale: Float[Tensor, " layer"]
    output_scale: Float[Tensor, " layer"]
    input_mean: Float[Tensor, "layer d_model"]
    output_mean: Float[Tensor, "layer d_model"]
    input_std: Float[Tensor, "layer d_model"]
    output_std: Float[Tensor, "layer d_model"]

    def scaling(self, kind: Literal["rms", "standardize"]) -> Scaling:
        """Units of a training: E||x||^2 = d_model per layer, or mean 0 and variance 1 of every dimension.

        Raises:
            ConfigError: a dimension never varies and so has no standard deviation to divide by.
        """
        if kind == "rms":
            return Scaling.by_layer(self.input_scale, self.output_scale, self.input_mean.shape[1])
        for what, std in (("input", self.input_std), ("output", self.output_std)):
            if not bool((std > 0).all()):
                layer, dimension = (std <= 0).nonzero()[0].tolist()
                raise ConfigError(
                    f"{what}s that vary in every dimension",
                    found=f"a constant in dimension {dimension} of layer {layer}",
                    where="train.scaling",
                    fix="use rms",
                )
        return Scaling(1 / self.input_std, 1 / self.output_std, self.input_mean, self.output_mean)


def save_moments(path: Path, inputs: Moments, outputs: Moments, *, scales: bool = False) -> None:
    """Write moments, and with `scales` the normalisation that follows from them.

    Raises:
        DivergedError: activations of a layer are all zero, so that no scale exists.
    """
    tensors = {"count": torch.tensor(inputs.count, dtype=torch.int64)}
    for name, moments in (("input", inputs), ("output", outputs)):
        tensors[f"{name}_mean"], tensors[f"{name}_m2"] = moments.mean, moments.m2
        tensors[f"{name}_sum_squares"] = moments.sum_squares
        if scales:
            tensors[f"{name}_scale"] = _scale(moments, name)
    atomic_write(path, save({key: value.contiguous() for key, value in tensors.items()}))


def _scale(moments: Moments, name: str) -> Float64[Tensor, " layer"]:
    mean_square = moments.sum_squares / moments.count
    silent = [index for index, value in enumerate(mean_square.tolist()) if value == 0]
    if silent:
        raise DivergedError(
            f"MLP {name}s that are not all zero",
            found=f"all zero over {moments.count} tokens",
            where=f"layer {', '.join(map(str, silent))} of the model",
            fix="check the model's weights",
        )
    return (moments.mean.shape[1] / mean_square).sqrt()


def _load(path: Path, rerun: str) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise StoreError("a whole safetensors file", found=str(error), where=path, fix=rerun) from error


def load_moments(path: Path) -> tuple[Moments, Moments]:
    """Moments of inputs and outputs.

    Raises:
        StoreError: the file is missing or damaged.
    """
    tensors = _load(path, "delete the shard's manifest.json and rerun stage cache")
    count = int(tensors["count"])
    return (
        Moments(count, tensors["input_mean"], tensors["input_m2"]),
        Moments(count, tensors["output_mean"], tensors["output_m2"]),
    )


def load_normalization(path: Path) -> Normalization:
    """The factors and means that training uses, in float32.

    Raises:
        StoreError: the file is missing or damaged.
    """
    tensors = _load(path, "rerun stage cache")
    names = ("input_scale", "output_scale", "input_mean", "output_mean")
    found = {name: tensors[name].to(torch.float32) for name in names}
    for side in ("input", "output"):
        found[f"{side}_std"] = (tensors[f"{side}_m2"] / tensors["count"]).sqrt().to(torch.float32)
    return Normalization(**found)


def merge_moments(parts: Iterable[tuple[Moments, Moments]]) -> tuple[Moments, Moments]:
    """Moments over all parts, merged in their order."""
    (inputs, outputs), *rest = parts
    for more_inputs, more_outputs in rest:
        inputs, outputs = inputs.merged(more_inputs), outputs.merged(more_outputs)
    return inputs, outputs
