"""A trained transcoder taken up again: back to normalised units, and a low-rank change of its decoders.

    W_dec^{s->m} + Q^s P^{s,m},   Q^s [feature rank], P^{s,m} [rank d_model]

after "LoRA" (Hu et al. 2021). P is zero at the start, so that the function is the base's; Q and P are trained, nothing
else is. The change is the same for a feature whatever the form of the base's decoders.
"""

import math
from dataclasses import replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.decoders import ALL, Decoder, LowRank, Untied
from circuitmill.core.mixture import Mixture
from circuitmill.core.operand import Operand
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError


@torch.no_grad()
def unfold(transcoder: Transcoder, scaling: Scaling) -> Transcoder:
    """A copy of a finished transcoder that reads and writes normalised numbers: the inverse of `core.scaling.fold`.

    Raw = normalised / scale + center is a scaling too, so this is folding with that one.

    Args:
        transcoder: In raw units.
        scaling: To normalised units; it need not be the one that the transcoder was trained with.

    Raises:
        ShapeError: decoders that targets share cannot hold a scale per dimension, or a mixture of transforms a center.
    """
    inverse = Scaling(
        input_scale=1 / scaling.input_scale,
        output_scale=1 / scaling.output_scale,
        input_center=-scaling.input_center * scaling.input_scale,
        output_center=-scaling.output_center * scaling.output_scale,
    )
    return fold(transcoder, inverse)


class Adapted(Decoder):
    """Decoders of any form with vectors, and a trained low-rank change of them."""

    def __init__(self, base: Decoder, rank: int) -> None:
        super().__init__(base.topology, base.n_features, base.d_model)
        self.base = base
        self.change = LowRank(base.topology, base.n_features, base.d_model, rank=rank).to(next(base.parameters()))

    def written(
        self, source: int, a: Operand, x: Float[Tensor, "token d_model"] | None = None, span: slice = ALL
    ) -> Float[Tensor, "token target d_model"]:
        """What the base writes, and the change."""
        return self.base.written(source, a, x, span) + self.change.written(source, a, x, span)

    def block(self, source: int, span: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """The sum of both."""
        return self.base.block(source, span) + self.change.block(source, span)

    def target_norms(self, source: int) -> Float[Tensor, "feature target"]:
        """||w + q P||^2 = ||w||^2 + 2 (w P^T) q^T + ||q P||^2, so that the changed decoder vectors are not made."""
        change, base = self.change, self.base.block(source)
        P = change.P[list(self.topology.pairs(source))]
        along = einsum(base, P, "feature target d_model, target rank d_model -> feature target rank")
        mixed = einsum(along, change.Q[source], "feature target rank, feature rank -> feature target")
        square = self.base.target_norms(source).square() + 2 * mixed + change.target_norms(source).square()
        # the derivative of a norm at zero is taken as zero
        positive = square > 0
        return torch.where(positive, square, 1.0).sqrt() * positive

    def feature_axes(self) -> dict[str, int | None]:
        """Of both."""
        both = {"base": self.base, "change": self.change}
        return {f"{part}.{name}": axis for part, one in both.items() for name, axis in one.feature_axes().items()}

    def divide_outputs(self, factor: Float[Tensor, "layer d_model"]) -> Decoder:
        """Both."""
        self.base = self.base.divide_outputs(factor)
        self.change.divide_outputs(factor)
        return self


@torch.no_grad()
def adapt(transcoder: Transcoder, rank: int, *, generator: torch.Generator) -> Transcoder:
    """Freeze a transcoder and put a trained low-rank change around its decoders. It is changed in place.

    Q ~ U(+-sqrt(3 / rank)) has variance 1 / rank, so that with Adam the first step moves a decoder's numbers by about
    the learning rate whatever the rank.

    Args:
        transcoder: The base.
        rank: Numbers between features and outputs.
        generator: On the CPU, so that the start is the same on every device.

    Returns:
        The same object.

    Raises:
        ConfigError: features of the base do not write a vector times the activation.
    """
    reason = _not_vectors(transcoder)
    if reason:
        raise ConfigError(
            "a base whose features write a vector times their activation",
            found=reason,
            where="train.adapter_rank",
            fix="set it to 0 to train all of the base",
        )
    adapted = Adapted(transcoder.decoder, rank)
    change = adapted.change
    change.Q.copy_((torch.rand(change.Q.shape, generator=generator) * 2 - 1) * math.sqrt(3 / rank))
    transcoder.decoder = adapted
    transcoder.requires_grad_(False)
    change.requires_grad_(True)
    return transcoder


def _not_vectors(transcoder: Transcoder) -> str:
    """Why features do not write a vector times the activation; empty if they do."""
    if isinstance(transcoder.decoder, Mixture):
        return "topology molt"
    return "pair_offset" if transcoder.architecture.pair_offset else ""


@torch.no_grad()
def merged(transcoder: Transcoder) -> Transcoder:
    """The same function without an adapter, as a transcoder that can be stored; a copy.

    Low-rank decoders stay low-rank, of the sum of both ranks; all others get a decoder per source and target.

    Raises:
        ShapeError: there is no adapter.
    """
    adapted = transcoder.decoder
    if not isinstance(adapted, Adapted):
        raise ShapeError(
            "a transcoder with an adapter",
            found=type(adapted).__name__,
            where="merged",
            fix="store it as it is",
        )
    base, change, form = adapted.base, adapted.change, transcoder.architecture
    if isinstance(base, LowRank):
        form = replace(form, rank=form.rank + change.Q.shape[2])
    else:
        form = replace(form, decoder="untied", pair_scale=False, shared=0)
    sizes = (transcoder.n_layers, transcoder.n_features, transcoder.d_model)
    plain = Transcoder(*sizes, form).to(transcoder.W_enc).requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if not name.startswith("decoder."):
            parameter.copy_(transcoder.get_parameter(name))
    if isinstance(base, LowRank) and isinstance(plain.decoder, LowRank):
        plain.decoder.Q.copy_(torch.cat([base.Q, change.Q], dim=2))
        plain.decoder.P.copy_(torch.cat([base.P, change.P], dim=1))
    elif isinstance(plain.decoder, Untied):
        for source, block in enumerate(plain.decoder.W_dec):
            block.copy_(adapted.block(source))
    return plain
