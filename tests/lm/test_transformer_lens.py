"""Both hookpoints against TransformerLens, for models built from configurations with weights converted by it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuit_tracer.replacement_model.replacement_model_transformerlens import ReplacementMLP
from tests.lm.conftest import ARCHITECTURES
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

from circuitmill.graphs.architectures import hooked_config
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import FEATURE_INPUT, FEATURE_OUTPUT
from circuitmill.lm.load import LanguageModel

TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))


def _gemma(config: Any) -> dict:
    return {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "act_fn": getattr(config, "hidden_act", None) or config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.head_dim,
        "rotary_base": config.rope_theta,
    }


def _gemma3(config: Any) -> dict:
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types]
    return {
        **_gemma(config),
        "rotary_base_local": config.rope_local_base_freq,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "use_qk_norm": True,
        "use_normalization_before_and_after": True,
        "use_local_attn": True,
        "attn_types": kinds,
        "window_size": config.sliding_window,
    }


def _gptj(config: Any) -> dict:
    return {
        "d_head": config.n_embd // config.n_head,
        "d_mlp": 4 * config.n_embd,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
        "rotary_dim": config.rotary_dim,
    }


def _phi(config: Any) -> dict:
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": int(config.partial_rotary_factor * d_head),
        "rotary_base": config.rope_theta,
    }


# what stage attribute does not support, and so circuitmill/graphs/architectures.py does not describe
OTHERS = {"gemma": ("gemma", _gemma), "gemma3_text": ("gemma", _gemma3), "gptj": ("gptj", _gptj), "phi": ("phi", _phi)}
DESCRIBED = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2")


def hooked_of(lm: LanguageModel, architecture: str) -> HookedTransformer:
    config = lm.model.config
    if architecture in OTHERS:
        name, describe = OTHERS[architecture]
        shape = {"n_layers": lm.n_layers, "d_model": lm.d_model, "d_vocab": lm.d_vocab}
        fields = {**shape, "n_heads": config.num_attention_heads, **describe(config)}
        converter = f"convert_{name}_weights"
    else:
        fields, converter = hooked_config(config)
    cfg = HookedTransformerConfig(**fields, n_ctx=lm.context, device="cpu")
    hooked = HookedTransformer(cfg)
    converted = getattr(weight_conversions, converter)(lm.model, cfg)
    report = hooked.load_state_dict(converted, strict=False)
    derived = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos", ".b_U")
    assert not report.unexpected_keys and all(key.endswith(derived) for key in report.missing_keys)
    return hooked


@pytest.mark.parametrize("architecture", [*DESCRIBED, *OTHERS])
def test_equal_to_transformer_lens(lm_of: Callable[[str], LanguageModel], architecture: str) -> None:
    assert architecture in ARCHITECTURES
    lm = lm_of(architecture)
    hooked = hooked_of(lm, architecture)
    theirs: dict[str, Tensor] = {}
    for layer, block in enumerate(hooked.blocks):
        # circuit-tracer wraps this module and names its two ends as below
        wrapper = ReplacementMLP(block.mlp)
        wrapper.hook_in.add_hook(lambda x, hook, k=layer: theirs.update({f"{k}.{FEATURE_INPUT}": x}))
        wrapper.hook_out.add_hook(lambda x, hook, k=layer: theirs.update({f"{k}.{FEATURE_OUTPUT}": x}))
        block.mlp = wrapper
    with torch.no_grad():
        hooked(TOKENS)
    inputs, outputs = capture_mlp(lm, TOKENS)
    for layer in range(lm.n_layers):
        for name, captured in ((FEATURE_INPUT, inputs), (FEATURE_OUTPUT, outputs)):
            expected = theirs[f"{layer}.{name}"]
            assert expected.std() > 0.01
            torch.testing.assert_close(captured[:, :, layer], expected, atol=1e-5, rtol=0)
