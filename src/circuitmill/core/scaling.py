"""Units: training sees normalised inputs and outputs; a finished model carries the scales.

Normalised to E||x||^2 = d_model per layer (`rms`: center zero, one scale per layer) or to mean 0 and variance 1 of
every dimension (`standardize`). Folding puts centers and scales into the weights, so that the folded model reads raw
inputs and writes raw outputs. Pre-activations, thresholds and activations are the same before and after.
"""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.mixture import Mixture
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError


@dataclass(frozen=True)
class Scaling:
    """normalised = (raw - center) * scale."""

    input_scale: Float[Tensor, "layer d_model"]
    output_scale: Float[Tensor, "layer d_model"]
    input_center: Float[Tensor, "layer d_model"]
    output_center: Float[Tensor, "layer d_model"]

    @classmethod
    def by_layer(
        cls, input_scale: Float[Tensor, " layer"], output_scale: Float[Tensor, " layer"], d_model: int
    ) -> "Scaling":
        """One factor per layer and side, nothing subtracted."""
        scales = [scale[:, None].repeat(1, d_model) for scale in (input_scale, output_scale)]
        return cls(*scales, *(torch.zeros_like(scale) for scale in scales))

    def to(self, device: torch.device) -> "Scaling":
        """The same numbers on another device."""
        return Scaling(
            self.input_scale.to(device),
            self.output_scale.to(device),
            self.input_center.to(device),
            self.output_center.to(device),
        )

    def inputs(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Normalise raw inputs."""
        return (x - self.input_center) * self.input_scale

    def outputs(self, y: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Normalise raw outputs."""
        return (y - self.output_center) * self.output_scale

    def raw_outputs(self, y: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Raw outputs of normalised ones."""
        return y / self.output_scale + self.output_center


@torch.no_grad()
def fold(transcoder: Transcoder, scaling: Scaling) -> Transcoder:
    """A copy that reads raw inputs and writes raw outputs.

    W_enc *= s_in and b_enc -= W_enc c_in; decoders and b_dec /= s_out and b_dec += c_out; W_skip between both;
    thresholds stay.

    Raises:
        ShapeError: decoders that targets share cannot hold a scale per dimension, transforms no center.
    """
    if isinstance(transcoder.decoder, Mixture) and scaling.input_center.any():
        raise ShapeError(
            "inputs with center zero for transforms, which have no constant part",
            found="a mean per dimension",
            where="architecture",
            fix="train with scaling rms",
        )
    folded = copy.deepcopy(transcoder)
    for source, layers in enumerate(folded.topology.reads):
        for row, layer in zip(folded.topology.encoders(source), layers, strict=True):
            folded.W_enc[row] *= scaling.input_scale[layer]
            folded.b_enc[source] -= folded.W_enc[row] @ scaling.input_center[layer]
    if isinstance(folded.decoder, Mixture):
        folded.decoder.multiply_inputs(scaling.input_scale)
    folded.decoder = folded.decoder.divide_outputs(scaling.output_scale)
    folded.b_dec.div_(scaling.output_scale).add_(scaling.output_center)
    if folded.W_skip is not None:
        folded.W_skip.mul_(scaling.input_scale[:, None]).div_(scaling.output_scale[:, :, None])
        # einsum(W_skip, center, "layer d_model e, layer e -> layer d_model")
        folded.b_dec.sub_((folded.W_skip @ scaling.input_center[:, :, None]).squeeze(2))
    # of a form that can hold the factors
    tied = folded.architecture.decoder == "source"
    folded.architecture = replace(folded.architecture, shared=0, pair_scale=folded.architecture.pair_scale or tied)
    return folded
