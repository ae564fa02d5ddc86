"""Terms of the training loss that need the language model: what replacing all its MLPs does to its predictions.

The model is frozen; a transcoder in normalised units is trained through it. Two passes over whole sequences:

1. The model as it is, without gradients: MLP inputs and outputs, from which the other terms are computed, and logits.
2. With all MLPs replaced, with gradients: the transcoder reads the replacement model's own MLP inputs, layer by layer,
   so that a gradient reaches it through everything above.

BOS positions keep the model's own MLP and count for nothing. An MLP sees one token at a time, so it runs on those
positions alone: of the second pass neither its time nor its memory is spent on the others.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitmill.core.metrics import cross_entropy, kl_divergence
from circuitmill.core.operand import Operand
from circuitmill.core.parts import WHOLE, Parts
from circuitmill.core.reconstruction import wide
from circuitmill.core.scaling import Scaling
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.load import LanguageModel
from circuitmill.lm.replacement import check_fits

Encode = Callable[[int, Float[Tensor, "token d_model"]], Operand]
"""From a source and its normalised inputs to activations, by the nonlinearity that trains."""


@dataclass(frozen=True)
class Original:
    """What the model does with some sequences, at the positions that count."""

    tokens: Int[Tensor, "sequence pos"]
    x: Float[Tensor, "token layer d_model"]
    """Normalised MLP inputs."""
    y: Float[Tensor, "token layer d_model"]
    """Normalised MLP outputs."""
    logits: Float[Tensor, "token d_vocab"]
    """In the model's precision."""


class EndToEnd:
    """A frozen language model as part of a loss.

    Args:
        lm: Its parameters receive no gradient.
        scaling: Between the model's units and those in which the transcoder is trained.
    """

    def __init__(self, lm: LanguageModel, scaling: Scaling) -> None:
        lm.model.requires_grad_(False)
        self._lm, self._scaling = lm, scaling.to(lm.device)

    def positions(
        self, tokens: Int[Tensor, "sequence pos"]
    ) -> tuple[Bool[Tensor, "sequence pos"], Bool[Tensor, "sequence pos"]]:
        """Positions that count, and those of them at which a token follows that is to be predicted.

        They are those of `core.behaviour.Behaviour`: not BOS, and not before BOS or at the end.
        """
        counted = tokens != self._lm.bos_id
        predicted = torch.zeros_like(counted)
        predicted[:, :-1] = counted[:, :-1] & counted[:, 1:]
        return counted, predicted

    @torch.no_grad()
    def original(self, tokens: Int[Tensor, "sequence pos"]) -> Original:
        """Run the model as it is."""
        tokens = tokens.to(self._lm.device)
        counted, _ = self.positions(tokens)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(arguments[0][counted])
            outputs.append(output[counted])

        handles = [module.register_forward_hook(keep) for module in mlps(self._lm.model)]
        try:
            logits = self._logits(tokens)[counted]
        finally:
            for handle in handles:
                handle.remove()
        x, y = (wide(torch.stack(side, dim=1)) for side in (inputs, outputs))
        return Original(tokens, self._scaling.inputs(x), self._scaling.outputs(y), logits)

    def terms(
        self,
        transcoder: Transcoder,
        encode: Encode,
        original: Original,
        names: Collection[str],
        parts: Parts = WHOLE,
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms of the loss by name, with gradients to the transcoder.

        | name | mean over | of |
        |---|---|---|
        | kl | positions that count | divergence of the replacement's predictions from the original's, in nats |
        | cross_entropy | predictions | surprise of the replacement model at the token that follows, in nats |

        Args:
            transcoder: Of the features that are here.
            encode: Its activations.
            original: Of the same sequences.
            names: Which terms.
            parts: Where other features are; every rank that has some runs the language model on the same sequences.

        Raises:
            ConfigError: another name.
            ShapeError: the transcoder was made for a model of another shape.
        """
        check_fits(self._lm, transcoder)
        unknown = sorted(set(names) - {"kl", "cross_entropy"})
        if unknown:
            raise ConfigError(
                "kl or cross_entropy", found=", ".join(unknown), where="train.loss", fix="name one of them"
            )
        counted, predicted = self.positions(original.tokens)
        with self._mlps_replaced(transcoder, encode, counted, parts):
            replaced = wide(self._logits(original.tokens)[counted])
        found: dict[str, Tensor] = {}
        for name in names:
            if name == "kl":
                found[name] = kl_divergence(wide(original.logits), replaced).mean()
            else:
                following = original.tokens.roll(-1, dims=1)[predicted]
                found[name] = cross_entropy(replaced[predicted[counted]], following).mean()
        return found

    def _logits(self, tokens: Tensor) -> Float[Tensor, "sequence pos d_vocab"]:
        """In the model's own precision, whatever autocast says, or the two passes would differ by rounding."""
        with torch.autocast(self._lm.device.type, enabled=False):
            return self._lm.model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def _mlps_replaced(
        self, transcoder: Transcoder, encode: Encode, counted: Bool[Tensor, "sequence pos"], parts: Parts
    ) -> Iterator[None]:
        """Let the transcoder stand for all MLPs, for one pass over sequences with these positions."""
        device = self._lm.device.type
        kept, own = ((mask.flatten().nonzero().squeeze(1)) for mask in (counted, ~counted))
        reconstruct = _Reconstruction(transcoder, encode, self._scaling, parts)
        # the model runs without autocast, the transcoder inside it with what was set outside
        precision = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        read: dict[int, Tensor] = {}

        def before(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                rows = arguments[0].flatten(0, 1)
                read[layer] = rows[kept]
                # one sequence: some MLPs take nothing else
                return (rows[own][None], *arguments[1:])

            return hook

        def after(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                with torch.autocast(device, **precision):
                    written = reconstruct(layer, read.pop(layer)).to(output.dtype)
                rows = output.new_empty(counted.numel(), output.shape[-1])
                rows = rows.index_copy(0, own, output[0]).index_copy(0, kept, written)
                return rows.view(*counted.shape, -1)

            return hook

        modules = mlps(self._lm.model)
        handles = [module.register_forward_pre_hook(before(layer)) for layer, module in enumerate(modules)]
        handles += [module.register_forward_hook(after(layer)) for layer, module in enumerate(modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reconstruction:
    """Raw MLP outputs from raw MLP inputs, layer after layer, by a transcoder in normalised units."""

    def __init__(self, transcoder: Transcoder, encode: Encode, scaling: Scaling, parts: Parts) -> None:
        self._transcoder, self._encode, self._scaling, self._parts = transcoder, encode, scaling, parts
        self._written: dict[int, Tensor] = {}

    def __call__(self, layer: int, raw: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        coder, scaling = self._transcoder, self._scaling
        x = (wide(raw) - scaling.input_center[layer]) * scaling.input_scale[layer]
        written = wide(coder.decoder.written(layer, self._encode(layer, x), x))
        for index, target in enumerate(coder.topology.writes[layer]):
            earlier, now = self._written.get(target), written[:, index]
            self._written[target] = now if earlier is None else earlier + now
        y_hat = self._parts.total(self._written.pop(layer)) + coder.b_dec[layer] + coder.skip_layer(layer, x)
        return y_hat / scaling.output_scale[layer] + scaling.output_center[layer]
