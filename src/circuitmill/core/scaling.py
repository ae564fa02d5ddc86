"""Units: training sees inputs and outputs scaled to E||x||^2 = d_model per layer; a finished model carries the scales.

Folding puts the scales into the weights, so that the folded model reads raw MLP inputs and writes raw MLP
outputs. Pre-activations, thresholds and activations are the same before and after.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.transcoder import Transcoder


@dataclass(frozen=True)
class Scaling:
    """One factor per layer and side; normalised = raw * factor."""

    input_scale: Float[Tensor, " layer"]
    output_scale: Float[Tensor, " layer"]

    def to(self, device: torch.device) -> "Scaling":
        """The same factors on another device."""
        return Scaling(self.input_scale.to(device), self.output_scale.to(device))

    def inputs(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Normalise raw MLP inputs."""
        return x * self.input_scale[:, None]

    def outputs(self, y: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Normalise raw MLP outputs."""
        return y * self.output_scale[:, None]


@torch.no_grad()
def fold(transcoder: Transcoder, scaling: Scaling) -> Transcoder:
    """A copy that reads raw inputs and writes raw outputs.

    W_enc^l *= s_in^l, W_dec^{l->m} /= s_out^m, b_dec^m /= s_out^m; b_enc and thresholds stay.
    """
    folded = Transcoder(transcoder.n_layers, transcoder.n_features, transcoder.d_model, device=transcoder.W_enc.device)
    folded.load_state_dict(transcoder.state_dict())
    folded.W_enc.mul_(scaling.input_scale[:, None, None])
    folded.b_dec.div_(scaling.output_scale[:, None])
    for source, block in enumerate(folded.W_dec):
        block.div_(scaling.output_scale[source:, None])
    return folded
