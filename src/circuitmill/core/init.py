"""Starting values of a transcoder."""

import math

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError


@torch.no_grad()
def uniform(transcoder: Transcoder, *, threshold: float, generator: torch.Generator) -> None:
    """The circuit-tracing start: W_enc ~ U(+-1/sqrt(n_features)), W_dec ~ U(+-1/sqrt(n_layers d_model)), biases zero.

    Args:
        threshold: Of every feature, in units of the pre-activation.
        generator: On the CPU, so that the start is the same on every device.
    """

    def fill(parameter: Tensor, bound: float) -> None:
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)

    fill(transcoder.W_enc, 1 / math.sqrt(transcoder.n_features))
    for block in transcoder.W_dec:
        fill(block, 1 / math.sqrt(transcoder.n_layers * transcoder.d_model))
    transcoder.b_enc.zero_()
    transcoder.b_dec.zero_()
    transcoder.log_threshold.fill_(math.log(threshold))


@torch.no_grad()
def encoder_bias_for_rate(transcoder: Transcoder, x: Float[Tensor, "token layer d_model"], *, rate: float) -> None:
    """Set every encoder bias so that its feature fires on a share `rate` of these tokens.

    b_enc = threshold - quantile_{1 - rate}(W_enc x), "Circuits Updates, January 2025"; one selection per layer over all
    features at once.

    Args:
        x: Normalised MLP inputs; some thousands of tokens, at least 1 / rate of them.
        rate: Share of tokens, between 0 and 1.

    Raises:
        ConfigError: the rate cannot be met with this many tokens.
    """
    n_tokens = x.shape[0]
    n_firing = round(rate * n_tokens)
    if not 1 <= n_firing < n_tokens:
        raise ConfigError(
            f"expected a firing rate between 1/{n_tokens} and 1",
            found=f"{rate:g}, or {n_firing} of {n_tokens} tokens",
            where="train.init.l0",
            fix="change init.l0 or raise batch_tokens",
        )
    for layer in range(transcoder.n_layers):
        drive = einsum(x[:, layer], transcoder.W_enc[layer], "token d_model, feature d_model -> feature token")
        # the (n_firing)-th largest and the one below it straddle the quantile: exactly n_firing tokens exceed
        # it
        low = drive.kthvalue(n_tokens - n_firing, dim=1).values
        transcoder.b_enc[layer] = transcoder.threshold[layer] - low


@torch.no_grad()
def decoder_bias_from_mean(transcoder: Transcoder, y_mean: Float[Tensor, "layer d_model"]) -> None:
    """Start the decoder biases at the mean normalised output, so that features need not learn a constant."""
    transcoder.b_dec.copy_(y_mean)
