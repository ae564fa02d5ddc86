"""The language model with its MLPs' outputs taken over by a transcoder, or by a constant.

1. A forward hook on every MLP module sees what goes in and what comes out, and puts another output in its
   place.
2. The replacement model writes, at layer m, y^m = b_dec^m + sum over l <= m of what layer l's features write
   to m (+ W_skip^m x^m), where x^l, which layer l's features read, is the replacement model's own MLP input at
   l. Contributions are added up as the layers run, so no more than [layer token d_model] numbers are held and
   no features of earlier layers. A transcoder that writes to earlier layers, or that writes what it reads, has
   no replacement model (`ArchitectureConfig.unreplaceable`).
3. At BOS positions the model keeps its own MLP outputs: transcoders are trained without them.

Hooks are removed whatever happens inside.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.load import LanguageModel
from circuitmill.lm.sites import Sites

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
    keeps_own = (tokens == lm.bos_id).to(lm.device)[..., None]
    with outputs_substituted(mlps(lm.model), substitute, layers, lambda: keeps_own):
        yield


@contextmanager
def outputs_substituted(
    modules: Sequence[nn.Module],
    substitute: Substitute,
    layers: Collection[int] | None,
    keeps_own: Callable[[], Bool[Tensor, "sequence pos 1"] | None],
) -> Iterator[None]:
    """As `mlps_substituted`, for the MLP modules of any model.

    Args:
        keeps_own: Asked in every layer: where the MLP's own output stays; None is nowhere.
    """
    replaced = set(range(len(modules))) if layers is None else set(layers)

    def at(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, own = arguments[0], keeps_own()
            substituted = substitute(layer, x.flatten(0, 1).float()).view(x.shape).to(output.dtype)
            if layer not in replaced:
                return output
            return substituted if own is None else torch.where(own, output, substituted)

        return hook

    handles = [modules[layer].register_forward_hook(at(layer)) for layer in range(max(replaced, default=-1) + 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Reconstruction:
    """What a transcoder writes to each layer, as the layers run.

    Raises:
        ConfigError: it does not stand for MLPs.
    """

    def __init__(self, transcoder: Transcoder) -> None:
        reason = transcoder.architecture.unreplaceable
        if reason:
            raise ConfigError(
                "a transcoder that can stand for MLPs while the layers run",
                found=reason,
                where="train.architecture",
                fix="use topology clt, plt or molt",
            )
        self._transcoder = transcoder
        self._written: dict[int, Tensor] = {}

    def __call__(self, layer: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """MLP outputs of a layer, from its MLP inputs and what earlier layers' features wrote."""
        if layer == 0:
            self._written.clear()
        features = self._transcoder.encode_layer(layer, x)
        contributions = self._transcoder.decode_layer(layer, features, x)
        for index, target in enumerate(self._transcoder.topology.writes[layer]):
            earlier = self._written.get(target)
            now = contributions[:, index]
            self._written[target] = now if earlier is None else earlier + now
        return self._written.pop(layer) + self._transcoder.b_dec[layer] + self._transcoder.skip_layer(layer, x)


def check_fits(lm: LanguageModel | Sites, transcoder: Transcoder) -> None:
    """Refuse a transcoder of another shape than the model's, or than that of some places of one or two models.

    Raises:
        ShapeError: the number of layers or the width differ.
    """
    ours, theirs = (transcoder.n_layers, transcoder.d_model), (lm.n_layers, lm.d_model)
    if ours != theirs:
        owner = f"model {lm.name} has"
        if isinstance(lm, Sites) and lm.hookpoint != "mlp":
            owner = f"the cache of {lm.hookpoint} of {owner}"
        raise ShapeError(
            f"expected a transcoder of {theirs[0]} layers and width {theirs[1]}, as {owner}",
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
        ConfigError: it does not stand for MLPs.
        ShapeError: the transcoder was made for a model of another shape.
    """
    check_fits(lm, transcoder)
    with mlps_substituted(lm, tokens, Reconstruction(transcoder), layers):
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
