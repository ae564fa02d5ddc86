"""The language model with its MLPs' outputs taken over by a transcoder, or by a constant.

1. A forward hook on every MLP module sees what goes in and what comes out, and puts another output in its
   place.
2. The replacement model writes, at layer m, y^m = b_dec^m + sum over l <= m of what layer l's features write
   to m, where layer l's features read the replacement model's own MLP input at l. Contributions are added up
   as the layers run, so no more than [layer token d_model] numbers are held and no features of earlier
   layers.
3. At BOS positions the model keeps its own MLP outputs: transcoders are trained without them.

Hooks are removed whatever happens inside.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.load import LanguageModel

Substitute = Callable[[int, Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
"""From a layer and its MLP inputs to what stands for its MLP outputs."""


@contextmanager
def mlps_substituted(
    lm: LanguageModel,
    tokens: Int[Tensor, "sequence pos"],
    substitute: Substitute,
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Let something else stand for the MLPs of the given layers, for forward passes over these tokens.

    `substitute` is called for every layer up to the last one replaced, in order, because a transcoder reads
    them all. Without `layers` all are replaced.
    """
    replaced = set(range(lm.n_layers)) if layers is None else set(layers)
    keeps_own = (tokens == lm.bos_id).to(lm.device)[..., None]

    def at(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = arguments[0]
            substituted = substitute(layer, x.flatten(0, 1).float()).view(x.shape).to(output.dtype)
            return torch.where(keeps_own, output, substituted) if layer in replaced else output

        return hook

    modules = mlps(lm.model)
    handles = [modules[layer].register_forward_hook(at(layer)) for layer in range(max(replaced, default=-1) + 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reconstruction:
    """What a transcoder writes to each layer, as the layers run."""

    def __init__(self, transcoder: Transcoder) -> None:
        self._transcoder = transcoder
        self._written: dict[int, Tensor] = {}

    def __call__(self, layer: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        if layer == 0:
            self._written.clear()
        features = self._transcoder.encode_layer(layer, x)
        contributions = self._transcoder.decode_layer(layer, features, x)
        for index, target in enumerate(self._transcoder.topology.writes[layer]):
            earlier = self._written.get(target)
            now = contributions[:, index]
            self._written[target] = now if earlier is None else earlier + now
        return self._written.pop(layer) + self._transcoder.b_dec[layer] + self._transcoder.skip_layer(layer, x)


def check_fits(lm: LanguageModel, transcoder: Transcoder) -> None:
    """Refuse a transcoder of another shape than the model's.

    Raises:
        ShapeError: the number of layers or the width differ.
    """
    ours, theirs = (transcoder.n_layers, transcoder.d_model), (lm.n_layers, lm.d_model)
    if ours != theirs:
        raise ShapeError(
            f"expected a transcoder of {theirs[0]} layers and width {theirs[1]}, as model {lm.name} has",
            found=f"{ours[0]} layers, width {ours[1]}",
            where="transcoder",
            fix="use the model that the transcoder was trained on",
        )


@torch.no_grad()
def original_logits(lm: LanguageModel, tokens: Int[Tensor, "sequence pos"]) -> Float[Tensor, "sequence pos d_vocab"]:
    """Logits of the model as it is, in float32."""
    return lm.model(input_ids=tokens.to(lm.device), use_cache=False).logits.float()


@torch.no_grad()
def replacement_logits(
    lm: LanguageModel,
    transcoder: Transcoder,
    tokens: Int[Tensor, "sequence pos"],
    layers: Collection[int] | None = None,
) -> Float[Tensor, "sequence pos d_vocab"]:
    """Logits of the model with MLPs replaced by a transcoder, except at BOS positions.

    Without `layers` all are replaced; otherwise features of the other layers still read and write upwards.

    Raises:
        ShapeError: the transcoder was made for a model of another shape.
    """
    check_fits(lm, transcoder)
    with mlps_substituted(lm, tokens, _Reconstruction(transcoder), layers):
        return original_logits(lm, tokens)


@torch.no_grad()
def ablated_logits(
    lm: LanguageModel,
    value: Float[Tensor, "layer d_model"],
    tokens: Int[Tensor, "sequence pos"],
    layers: Collection[int] | None = None,
) -> Float[Tensor, "sequence pos d_vocab"]:
    """Logits of the model with a constant in place of MLP outputs, except at BOS positions.

    Zeros make zero ablation, the mean MLP outputs make mean ablation. Without `layers` all are replaced.
    """
    value = value.to(lm.device, torch.float32)
    with mlps_substituted(lm, tokens, lambda layer, x: value[layer].expand_as(x), layers):
        return original_logits(lm, tokens)
