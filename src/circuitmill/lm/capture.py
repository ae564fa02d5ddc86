"""MLP inputs and outputs of every layer, through forward hooks on the model's MLP modules."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.load import LanguageModel


class AllSeen(Exception):
    """Not an error, raised by a hook: what was asked for has been seen, the rest of the pass is not needed."""


def require_context(lm: LanguageModel, length: int) -> None:
    """Refuse sequences that are too long for a model.

    Raises:
        ConfigError: they are.
    """
    if length > lm.context:
        raise ConfigError(
            f"sequences of at most {lm.context} tokens, the context of model {lm.name}",
            found=f"{length} tokens",
            where="tokenize.context",
            fix="lower the context and tokenize again, or shorten the prompt",
        )


def run_hooked(
    lm: LanguageModel, tokens: Int[Tensor, "sequence pos"], handles: Sequence[torch.utils.hooks.RemovableHandle]
) -> None:
    """Run the model without its head until a hook has seen enough; the hooks are removed whatever happens."""
    try:
        with torch.no_grad():
            lm.model.base_model(input_ids=tokens.to(lm.device), use_cache=False)
    except AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()


def keep_rows(
    kept: Float[Tensor, "... d_model"],
    value: Float[Tensor, "sequence pos d_model"],
    wanted: Int[Tensor, " token"] | None,
) -> None:
    """Copy activations to where they are kept: all, or those of the wanted positions, counted over all sequences."""
    if wanted is None:
        kept.copy_(value)
    else:
        torch.index_select(value.to(kept.dtype).flatten(0, 1), 0, wanted, out=kept)


def capture_mlp(
    lm: LanguageModel, tokens: Int[Tensor, "sequence pos"], keep: Bool[Tensor, "sequence pos"] | None = None
) -> tuple[Float[Tensor, "... layer d_model"], Float[Tensor, "... layer d_model"]]:
    """Run the model and keep what goes into and comes out of every MLP.

    The forward pass ends at the last MLP: neither the final norm nor logits are computed. The hooks are
    removed whatever happens.

    Args:
        lm: The model.
        tokens: What it reads.
        keep: Positions that are wanted; None for all. To leave the others out here saves a second copy of the rest.

    Returns:
        Inputs (after the norm in front of the MLP) and outputs, in the model's precision, on its device: of shape
        [sequence pos layer d_model], or with `keep` [token layer d_model] in the order of the positions, where every
        layer is contiguous for itself.

    Raises:
        ConfigError: the sequences are longer than the model's context, or its architecture is unknown.
        ShapeError: an MLP's input or output is not of the model's width.
    """
    n_sequences, length = tokens.shape
    require_context(lm, length)
    seen = (n_sequences, length, lm.d_model)
    wanted = None if keep is None else keep.flatten().nonzero().squeeze(1).to(lm.device)
    if wanted is None:
        empty = torch.empty(2, n_sequences, length, lm.n_layers, lm.d_model, dtype=lm.model.dtype, device=lm.device)
    else:
        empty = torch.empty(2, lm.n_layers, len(wanted), lm.d_model, dtype=lm.model.dtype, device=lm.device)
        empty = empty.movedim(1, -2)
    inputs, outputs = empty

    def take(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            for kept, value, what in ((inputs, arguments[0], "input"), (outputs, output, "output")):
                if value.shape != seen:
                    raise ShapeError(
                        f"MLP {what} of shape {seen}",
                        found=f"{tuple(value.shape)}",
                        where=f"model {lm.name}, layer {layer}",
                        fix="this architecture needs its own row in circuitmill/lm/hookpoints.py",
                    )
                keep_rows(kept[..., layer, :], value, wanted)
            if layer == lm.n_layers - 1:
                raise AllSeen

        return hook

    handles = [module.register_forward_hook(take(layer)) for layer, module in enumerate(mlps(lm.model))]
    run_hooked(lm, tokens, handles)
    return inputs, outputs
