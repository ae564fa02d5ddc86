"""A block of a transcoder's features: the same stretch of every source, numbered source after source."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.core.decoders import ALL, Decoder, SourceTied, TargetTied
from circuitmill.core.mixture import Mixture
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError


@dataclass(frozen=True)
class LogitWeights:
    """Effects of features on logits, largest first, and smallest first."""

    top: Float[Tensor, "feature item"]
    top_tokens: Int[Tensor, "feature item"]
    bottom: Float[Tensor, "feature item"]
    bottom_tokens: Int[Tensor, "feature item"]


class FeatureBlock:
    """Features `span` of every source. Feature i of the block is feature span.start + i % width of source i // width.

    Args:
        transcoder: Its weights are used as they are, on their device.
        span: Which features of each layer; not empty.

    Raises:
        ShapeError: the span is empty.
    """

    def __init__(self, transcoder: Transcoder, span: slice) -> None:
        if not 0 <= span.start < span.stop <= transcoder.n_features:
            raise ShapeError(
                f"expected a block of features within 0 to {transcoder.n_features}",
                found=f"{span.start} to {span.stop}",
                where="span",
                fix="use at most as many blocks as there are features per layer",
            )
        self._transcoder, self.span = transcoder, span
        self.width = span.stop - span.start
        self.n_features = transcoder.n_sources * self.width

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token feature"]:
        """Activations of the block's features, on the transcoder's device wherever the inputs are."""
        sources = range(self._transcoder.n_sources)
        x = x.to(self._transcoder.W_enc.device)
        return torch.cat([self._transcoder.encode_source(source, x, self.span) for source in sources], dim=1)

    @torch.no_grad()
    def logits(self, unembedding: Float[Tensor, "d_vocab d_model"], k: int) -> LogitWeights:
        """The tokens whose logits the features raise and lower most, through the residual stream alone.

        What counts is the sum of a feature's decoder vectors over its targets: of a crosscoder over models, over those
        of the last model; with offsets on active features, what a unit of activation adds. The mean effect over the
        vocabulary changes no probability and is taken out. A transform of a mixture writes no vector, so for those
        there are no tokens.

        Args:
            unembedding: With the final norm's gain folded in; that of the last model.
            k: At most so many tokens each way.
        """
        centred = unembedding - unembedding.mean(dim=0)
        k = 0 if isinstance(self._transcoder.decoder, Mixture) else min(k, centred.shape[0])
        highest, lowest = [], []
        for source in range(self._transcoder.n_sources):
            written = self._written(source, centred.shape[1])
            effect = written @ centred.T
            highest.append(effect.topk(k, dim=1))
            lowest.append(effect.topk(k, dim=1, largest=False))
        return LogitWeights(
            top=torch.cat([part.values for part in highest]).cpu(),
            top_tokens=torch.cat([part.indices for part in highest]).cpu(),
            bottom=torch.cat([part.values for part in lowest]).cpu(),
            bottom_tokens=torch.cat([part.indices for part in lowest]).cpu(),
        )

    def _written(self, source: int, d_model: int) -> Float[Tensor, "feature d_model"]:
        decoder, architecture = _linear(self._transcoder.decoder), self._transcoder.architecture
        if isinstance(decoder, Mixture):
            return self._transcoder.W_enc.new_zeros(self.width, d_model)
        per_model = self._transcoder.n_layers // architecture.models
        targets = slice(-per_model, None) if architecture.models > 1 else ALL
        return decoder.block(source, self.span)[:, targets].sum(dim=1)


def _linear(decoder: Decoder) -> Decoder:
    """A decoder without offsets, which shares its parameters."""
    if not isinstance(decoder, TargetTied | SourceTied) or decoder.pair_offset is None:
        return decoder
    with torch.device("meta"):
        linear = type(decoder)(decoder.topology, decoder.n_features, decoder.d_model, scale=False, offset=False)
    linear.W_dec, linear.pair_scale = decoder.W_dec, decoder.pair_scale
    return linear
