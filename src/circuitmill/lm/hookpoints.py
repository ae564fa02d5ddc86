"""Where each architecture keeps its MLPs, its final norm and its unembedding.

A feature reads the input of a block's `mlp` module and writes to its output. TransformerLens and
circuit-tracer call these places `mlp.hook_in` and `mlp.hook_out`; in Hugging Face's models they are what goes
into and comes out of one module per block, so plain forward hooks reach them. So they are in TransformerLens's own
models (lm/lens.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitmill.errors import ConfigError
from circuitmill.lm.lens import LensModel

FEATURE_INPUT = "mlp.hook_in"
"""circuit-tracer's name of what features read."""
FEATURE_OUTPUT = "mlp.hook_out"
"""circuit-tracer's name of what features write."""


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture."""

    blocks: str
    """The list of blocks; each has a module named `mlp`."""
    norm: str
    """The norm in front of the unembedding."""
    gain: Literal["centred", "plain", "plus_one"]
    """LayerNorm (subtracts the mean), RMSNorm, or RMSNorm whose gain is 1 + weight."""


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "transformer.ln_f", "centred"),
    "gpt_neo": Family("transformer.h", "transformer.ln_f", "centred"),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm", "centred"),
    "gptj": Family("transformer.h", "transformer.ln_f", "centred"),
    "phi": Family("model.layers", "model.final_layernorm", "centred"),
    "llama": Family("model.layers", "model.norm", "plain"),
    "mistral": Family("model.layers", "model.norm", "plain"),
    "qwen2": Family("model.layers", "model.norm", "plain"),
    "qwen3": Family("model.layers", "model.norm", "plain"),
    "gemma": Family("model.layers", "model.norm", "plus_one"),
    "gemma2": Family("model.layers", "model.norm", "plus_one"),
    "gemma3_text": Family("model.layers", "model.norm", "plus_one"),
}
"""Hugging Face's `model_type` -> where things are."""


def family(model: PreTrainedModel) -> Family:
    """The row for a model.

    Raises:
        ConfigError: an architecture that is not in the table.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ConfigError(
            f"a model of one of the types {', '.join(sorted(FAMILIES))}",
            found=repr(model_type),
            where="model.name",
            fix="use another model, or add a row to FAMILIES in circuitmill/lm/hookpoints.py and its test",
        )
    return FAMILIES[model_type]


def mlps(model: PreTrainedModel | LensModel) -> list[nn.Module]:
    """The MLP module of every block, first block first.

    Raises:
        ConfigError: an architecture that is not in the table.
    """
    if isinstance(model, LensModel):
        return model.mlps
    return [block.get_submodule("mlp") for block in model.get_submodule(family(model).blocks).children()]


def unembedding(model: PreTrainedModel | LensModel) -> Float[Tensor, "d_vocab d_model"]:
    """The unembedding with the final norm's gain (and centring, for LayerNorm) folded in, in float32.

    A vector v added to the last residual stream moves the logits by `unembedding @ v`, up to the norm's
    positive scale: logits = W_U diag(gain) (I - 11^T/d) v for LayerNorm, W_U diag(gain) v for RMSNorm.

    Raises:
        ConfigError: an architecture that is not in the table.
    """
    if isinstance(model, LensModel):
        return model.unembedding()
    row = family(model)
    gain = model.get_parameter(f"{row.norm}.weight").detach().to(torch.float32)
    head: nn.Module = model.get_output_embeddings()  # pyright: ignore[reportAssignmentType]
    weight = head.get_parameter("weight").detach().to(torch.float32)
    folded = weight * (1 + gain if row.gain == "plus_one" else gain)
    return folded - folded.mean(dim=1, keepdim=True) if row.gain == "centred" else folded
