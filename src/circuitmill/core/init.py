"""Starting values of a transcoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitmill.core.decoders import LowRank, SharedOverModels, Untied
from circuitmill.core.mixture import Mixture
from circuitmill.core.parts import Shard
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class _Draws:
    """Random numbers for all features, of which those of a shard are used: so that a shard starts as in the whole."""

    generator: torch.Generator
    shard: Shard

    def fill(self, parameter: Tensor, bound: float, axis: int | None = None) -> None:
        """Set a parameter to U(+-bound).

        Args:
            parameter: To be filled.
            bound: Largest magnitude.
            axis: Along which it lists features; None if it does not, or if all of them are here.
        """
        if axis is None or parameter.shape[axis] == self.shard.total:
            self._fill(parameter, bound, slice(0, None), parameter.shape)
            return
        # a matrix at a time, so that no more than that of the whole is in memory
        for part in [parameter] if axis == 0 else parameter:
            rows = slice(self.shard.first, self.shard.last)
            self._fill(part, bound, rows, torch.Size((self.shard.total, *part.shape[1:])))

    def _fill(self, part: Tensor, bound: float, rows: slice, whole: torch.Size) -> None:
        part.copy_((torch.rand(whole, generator=self.generator)[rows] * 2 - 1) * bound)


def _shard(transcoder: Transcoder, shard: Shard | None) -> Shard:
    return shard or Shard(0, transcoder.n_features, transcoder.n_features)


def _uniform_decoder(transcoder: Transcoder, bound: float, draws: _Draws) -> None:
    """Decoder vectors with about the spread of U(+-bound), whatever their form."""
    decoder = transcoder.decoder
    if isinstance(decoder, LowRank):
        # a product of two uniforms summed over the rank has the variance of U(+-bound)
        inner = bound * math.sqrt(3 / decoder.Q.shape[2])
        draws.fill(decoder.Q, 1.0, axis=1)
        draws.fill(decoder.P, inner)
        return
    if isinstance(decoder, Mixture):
        row = 0
        for count, rank in decoder.groups:
            rows = slice(row, row + count * rank)
            # Xavier: both halves keep the variance of what goes through them
            for side in (decoder.U, decoder.V):
                draws.fill(side[:, rows], math.sqrt(6 / (rank + transcoder.d_model)))
            row = rows.stop
        return
    axis = 0 if isinstance(decoder, Untied) else 1
    for block in _vectors(transcoder):
        draws.fill(block, bound, None if isinstance(decoder, SharedOverModels) else axis)


def _vectors(transcoder: Transcoder) -> list[nn.Parameter]:
    """Parameters that are decoder vectors: named W_dec, or W_shared."""
    return [parameter for name, parameter in transcoder.decoder.named_parameters() if name.startswith("W_")]


def _exclusive_blocks(transcoder: Transcoder) -> list[nn.Parameter]:
    return [*transcoder.decoder.W_dec] if isinstance(transcoder.decoder, Untied) else []


@torch.no_grad()
def uniform(transcoder: Transcoder, *, generator: torch.Generator, shard: Shard | None = None) -> None:
    """The circuit-tracing start: W_enc ~ U(+-1/sqrt(n_features)), W_dec ~ U(+-1/sqrt(n_layers d_model)).

    Args:
        transcoder: To be filled.
        generator: On the CPU, so that the start is the same on every device.
        shard: Its features among all; None if these are all.
    """
    draws = _Draws(generator, _shard(transcoder, shard))
    draws.fill(transcoder.W_enc, 1 / math.sqrt(draws.shard.total), axis=1)
    _uniform_decoder(transcoder, 1 / math.sqrt(transcoder.n_layers * transcoder.d_model), draws)


@torch.no_grad()
def transpose(transcoder: Transcoder, *, generator: torch.Generator, shard: Shard | None = None) -> None:
    """As `uniform`, with the encoder the transpose of the decoder block of the layer it reads."""
    uniform(transcoder, generator=generator, shard=shard)
    _transpose(transcoder, 1.0)


@torch.no_grad()
def january_2025(transcoder: Transcoder, *, generator: torch.Generator, shard: Shard | None = None) -> None:
    """W_dec ~ U(+-1/sqrt(d_model)), W_enc = (d_model / n_features) W_dec^T ("Circuits Updates, January 2025").

    Defined there for one layer; a cross-layer transcoder takes the block of its own layer for the transpose, and the
    other blocks as in `uniform`. Decoders that sources or targets share have the larger scale everywhere, and so have a
    crosscoder's, all of whose layers are its own.
    """
    bound = 1 / math.sqrt(transcoder.d_model)
    draws = _Draws(generator, _shard(transcoder, shard))
    _uniform_decoder(transcoder, bound, draws)
    _transpose(transcoder, transcoder.d_model / draws.shard.total)
    topology, decoder = transcoder.topology, transcoder.decoder
    if not topology.reads_one:
        return
    for source, targets in enumerate(topology.writes):
        for index, target in enumerate(targets):
            if target == source:
                continue
            if isinstance(decoder, Untied):
                decoder.W_dec[source][:, index] /= math.sqrt(transcoder.n_layers)
            elif isinstance(decoder, LowRank):
                decoder.P[topology.pairs(source)[index]] /= math.sqrt(transcoder.n_layers)


def _transpose(transcoder: Transcoder, factor: float) -> None:
    for source, targets in enumerate(transcoder.topology.writes):
        block = transcoder.decoder_block(source)
        for row, layer in zip(transcoder.topology.encoders(source), transcoder.topology.reads[source], strict=True):
            transcoder.W_enc[row] = factor * block[:, targets.index(layer)]


INITIALISERS: dict[str, Callable[..., None]] = {
    "uniform": uniform,
    "transpose": transpose,
    "january_2025": january_2025,
}
"""Name -> function that fills encoder and decoder; biases stay zero."""


@torch.no_grad()
def zero_decoder(transcoder: Transcoder) -> None:
    """Features write nothing: decoder vectors are zero, factors and encoders stay.

    Of two halves whose product is the decoder one becomes zero, so that the other gives it a gradient.
    """
    decoder = transcoder.decoder
    if isinstance(decoder, LowRank):
        decoder.P.zero_()
    elif isinstance(decoder, Mixture):
        decoder.U.zero_()
    else:
        for parameter in _vectors(transcoder):
            parameter.zero_()


@torch.no_grad()
def identical_models(transcoder: Transcoder) -> None:
    """Give every model of a crosscoder the first one's encoders and decoders ("Circuits Updates, February 2025")."""
    models = transcoder.architecture.models
    per_model = transcoder.n_layers // models
    for index in range(1, models):
        rows = slice(index * per_model, (index + 1) * per_model)
        transcoder.W_enc[rows] = transcoder.W_enc[:per_model]
        for block in _exclusive_blocks(transcoder):
            block[:, rows] = block[:, :per_model]


@torch.no_grad()
def encoder_bias_for_rate(transcoder: Transcoder, x: Float[Tensor, "token layer d_model"], *, rate: float) -> None:
    """Set every encoder bias so that its feature fires on a share `rate` of these tokens, exactly.

    b_enc = threshold - quantile_{1 - rate}(W_enc x), "Circuits Updates, January 2025"; one selection per source over
    all features at once. The quantile is the middle between the last token that fires and the next, which rounding
    cannot push over the threshold.

    Args:
        x: Normalised inputs; some thousands of tokens, at least 1 / rate of them.
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
    transcoder.b_enc.zero_()
    for source in range(transcoder.n_sources):
        drive = transcoder.pre_activations_source(source, x).T.contiguous()
        last, following = drive.topk(n_firing + 1, dim=1).values[:, -2:].unbind(dim=1)
        transcoder.b_enc[source] = transcoder.threshold[source] - (last + following) / 2


@torch.no_grad()
def decoder_bias_from_mean(transcoder: Transcoder, y_mean: Float[Tensor, "layer d_model"]) -> None:
    """Start the decoder biases at the mean normalised output, so that features need not learn a constant."""
    transcoder.b_dec.copy_(y_mean)
