"""Where each architecture keeps its MLPs, its residual stream, its final norm and its unembedding.

A feature of a transcoder reads the input of a block's `mlp` module and writes to its output. TransformerLens and
circuit-tracer call these places `mlp.hook_in` and `mlp.hook_out`; in Hugging Face's models they are what goes
into and comes out of one module per block, so plain forward hooks reach them. So they are in TransformerLens's own
models (lm/lens.py).

Hookpoints, under TransformerLens's names (`sites` finds them):

| name | what |
|---|---|
| mlp_in, mlp_out | those two, after the norm in front of the MLP and before one behind it (Gemma 2 and 3) |
| resid_pre, resid_post | the residual stream in front of a block and behind it |
| resid_mid | the stream between attention and MLP; parallel blocks have none |
| attn_out | what attention adds to the stream, so after the norm behind it where there is one |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitmill.config.activations import Hookpoint, Single
from circuitmill.errors import ConfigError
from circuitmill.lm.lens import LensModel

FEATURE_INPUT = "mlp.hook_in"
"""circuit-tracer's name of what features read."""
FEATURE_OUTPUT = "mlp.hook_out"
"""circuit-tracer's name of what features write."""
HOOK_NAMES: dict[Hookpoint, dict[str, str]] = {
    "mlp": {"inputs": FEATURE_INPUT, "outputs": FEATURE_OUTPUT},
    "mlp_in": {"inputs": FEATURE_INPUT},
    "mlp_out": {"inputs": FEATURE_OUTPUT},
    "attn_out": {"inputs": "hook_attn_out"},
    "resid_pre": {"inputs": "hook_resid_pre"},
    "resid_mid": {"inputs": "hook_resid_mid"},
    "resid_post": {"inputs": "hook_resid_post"},
}
"""Hookpoint -> what is read and written, under TransformerLens's or circuit-tracer's name, below a block."""


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture."""

    blocks: str
    """The list of blocks; each has a module named `mlp`."""
    norm: str
    """The norm in front of the unembedding."""
    gain: Literal["centred", "plain", "plus_one"]
    """LayerNorm (subtracts the mean), RMSNorm, or RMSNorm whose gain is 1 + weight."""
    attention: str
    """The module of a block whose output is added to the residual stream: attention, or a norm behind it."""
    middle: str
    """The module of a block that reads the stream after attention; none if attention and MLP read the same stream."""


_SELF, _AFTER, _BEFORE = "self_attn", "post_attention_layernorm", "pre_feedforward_layernorm"
FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "transformer.ln_f", "centred", "attn", "ln_2"),
    "gpt_neo": Family("transformer.h", "transformer.ln_f", "centred", "attn", "ln_2"),
    # if its configuration asks for sequential blocks; see `_parallel`
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm", "centred", "attention", _AFTER),
    "gptj": Family("transformer.h", "transformer.ln_f", "centred", "attn", ""),
    "phi": Family("model.layers", "model.final_layernorm", "centred", _SELF, ""),
    "llama": Family("model.layers", "model.norm", "plain", _SELF, _AFTER),
    "mistral": Family("model.layers", "model.norm", "plain", _SELF, _AFTER),
    "qwen2": Family("model.layers", "model.norm", "plain", _SELF, _AFTER),
    "qwen3": Family("model.layers", "model.norm", "plain", _SELF, _AFTER),
    "gemma": Family("model.layers", "model.norm", "plus_one", _SELF, _AFTER),
    "gemma2": Family("model.layers", "model.norm", "plus_one", _AFTER, _BEFORE),
    "gemma3_text": Family("model.layers", "model.norm", "plus_one", _AFTER, _BEFORE),
}
"""Hugging Face's `model_type` -> where things are."""


@dataclass(frozen=True)
class Site:
    """Where a forward hook finds the activations of a hookpoint in one block."""

    module: nn.Module
    side: Literal["input", "output"]
    """Whether they go into the module or come out of it; the first of its arguments or results."""


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
    return [block.get_submodule("mlp") for block in _blocks(model)]


def sites(model: PreTrainedModel | LensModel, hookpoint: Single) -> list[Site]:
    """The place of a hookpoint in every block, first block first.

    Raises:
        ConfigError: an architecture that is not in the table or has no such place.
    """
    if hookpoint in ("mlp_in", "mlp_out"):
        return [Site(module, "input" if hookpoint == "mlp_in" else "output") for module in mlps(model)]
    if hookpoint == "resid_mid" and _parallel(model):
        kind = "parallel_attn_mlp" if isinstance(model, LensModel) else model.config.model_type
        raise ConfigError(
            "a hookpoint that the model has: attention and MLP of its blocks read the same stream, so that nothing "
            "lies between them",
            found=f"resid_mid, for a model of type {kind}",
            where="cache.hookpoint",
            fix="use resid_pre, resid_post, attn_out, mlp_in or mlp_out",
        )
    if isinstance(model, LensModel):
        # TransformerLens has a module that does nothing at each of them
        return [Site(block.get_submodule(HOOK_NAMES[hookpoint]["inputs"]), "output") for block in model.blocks]
    row = family(model)
    places: dict[str, tuple[str, Literal["input", "output"]]] = {
        "resid_pre": ("", "input"),
        "resid_mid": (row.middle, "input"),
        "resid_post": ("", "output"),
        "attn_out": (row.attention, "output"),
    }
    name, side = places[hookpoint]
    return [Site(block.get_submodule(name), side) for block in _blocks(model)]


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(family(model).blocks).children())


def _parallel(model: PreTrainedModel | LensModel) -> bool:
    """Whether attention and MLP read the same stream."""
    if isinstance(model, LensModel):
        return model.hooked.cfg.parallel_attn_mlp
    return not family(model).middle or getattr(model.config, "use_parallel_residual", False)


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
