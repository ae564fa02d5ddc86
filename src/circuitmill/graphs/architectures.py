"""Hugging Face architectures in TransformerLens's terms: configuration as plain data, converter by name.

TransformerLens finds a model's shape in a table of names on the hub. A model in a local folder has no such
name, so the same fields are read from the model's own configuration here. Whatever a converter does not carry
over (an attention bias it does not know, a rope variant) shows up as different logits, which
`tracer.replacement_model` refuses.
"""

from collections.abc import Callable
from typing import Any

from circuitmill.errors import ConfigError

_FIX = "use a model of one of these types, or add a row to circuitmill/graphs/architectures.py"


def hooked_config(config: Any) -> tuple[dict[str, Any], str]:
    """Fields of a `HookedTransformerConfig` without context, device and dtype, and the converter's name.

    Args:
        config: A Hugging Face model configuration.

    Raises:
        ConfigError: an architecture or a rope variant that is not supported.
    """
    row = _ARCHITECTURES.get(config.model_type)
    if row is None:
        raise ConfigError(
            "a model type that can be traced: " + ", ".join(sorted(_ARCHITECTURES)),
            found=repr(config.model_type),
            where="model.name",
            fix=_FIX,
        )
    converter, describe = row
    heads = config.num_attention_heads
    shared = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "d_vocab": config.vocab_size,
    }
    return {**shared, **describe(config)}, converter


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "d_mlp": config.n_inner or 4 * config.hidden_size,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _gpt_neo(config: Any) -> dict[str, Any]:
    return {
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": False,  # GPT-Neo does not divide attention scores by sqrt(d_head)
        "use_local_attn": True,
        "attn_types": list(config.attention_layers),
        "window_size": config.window_size,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": int(config.rotary_pct * d_head),
        **_rotary(config),
    }


def _gated(config: Any) -> dict[str, Any]:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "d_mlp": config.intermediate_size,
        "act_fn": getattr(config, "hidden_act", None) or config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "rotary_dim": d_head,
        **_rotary(config),
    }


def _llama(config: Any) -> dict[str, Any]:
    # grouped attention is a class of its own there, asked for by a number of key heads
    grouped = config.num_key_value_heads != config.num_attention_heads
    return {**_gated(config), "n_key_value_heads": config.num_key_value_heads if grouped else None}


def _mistral(config: Any) -> dict[str, Any]:
    layers = ["sliding_attention" if config.sliding_window else "full_attention"] * config.num_hidden_layers
    return {**_gated(config), "n_key_value_heads": config.num_key_value_heads, **_windows(config, layers)}


def _qwen2(config: Any) -> dict[str, Any]:
    return {
        **_gated(config),
        "n_key_value_heads": config.num_key_value_heads,
        **_windows(config, config.layer_types),
    }


def _qwen3(config: Any) -> dict[str, Any]:
    return {**_llama(config), "use_qk_norm": True, **_windows(config, config.layer_types)}


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        **_gated(config),
        "n_key_value_heads": config.num_key_value_heads,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
        **_windows(config, config.layer_types),
    }


def _windows(config: Any, layer_types: list[str]) -> dict[str, Any]:
    """Sliding-window layers; both libraries let position q see q - window < key <= q."""
    if "sliding_attention" not in layer_types:
        return {}
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in layer_types]
    return {"use_local_attn": True, "attn_types": kinds, "window_size": config.sliding_window}


def _rotary(config: Any) -> dict[str, Any]:
    base = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": getattr(config, "rope_theta", None) or config.rotary_emb_base,
    }
    scaling = getattr(config, "rope_scaling", None)
    if not scaling:
        return base
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise ConfigError(
            "rotary positions without scaling or with rope_type llama3",
            found=f"rope_type {kind!r}",
            where="model.name",
            fix=_FIX,
        )
    return {
        **base,
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_low_freq_factor": scaling["low_freq_factor"],
        "NTK_by_parts_high_freq_factor": scaling["high_freq_factor"],
        "NTK_by_parts_factor": scaling["factor"],
        "NTK_original_ctx_len": scaling["original_max_position_embeddings"],
    }


_ARCHITECTURES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "gpt2": ("convert_gpt2_weights", _gpt2),
    "gpt_neo": ("convert_neo_weights", _gpt_neo),
    "gpt_neox": ("convert_neox_weights", _gpt_neox),
    "llama": ("convert_llama_weights", _llama),
    "mistral": ("convert_mistral_weights", _mistral),
    "qwen2": ("convert_qwen2_weights", _qwen2),
    "qwen3": ("convert_qwen3_weights", _qwen3),
    "gemma2": ("convert_gemma_weights", _gemma2),
}
