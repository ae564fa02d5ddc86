from collections.abc import Callable

import pytest
import torch
from circuit_tracer.replacement_model.replacement_model_transformerlens import ReplacementMLP
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_neo_weights

from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import FAMILIES, FEATURE_INPUT, FEATURE_OUTPUT, mlps
from circuitmill.lm.load import LanguageModel

TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
Maker = Callable[[str], LanguageModel]


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_captured_outputs_are_the_modules_own(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    inputs, outputs = capture_mlp(lm, TOKENS)
    assert inputs.shape == outputs.shape == (3, 11, lm.n_layers, lm.d_model)
    for layer, module in enumerate(mlps(lm.model)):
        torch.testing.assert_close(module(inputs[:, :, layer]), outputs[:, :, layer], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_replacing_mlps_by_captured_outputs_gives_the_same_logits(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    expected = lm.model(TOKENS).logits
    _, outputs = capture_mlp(lm, TOKENS)
    handles = [
        module.register_forward_hook(lambda _m, _a, _o, layer=layer: outputs[:, :, layer])
        for layer, module in enumerate(mlps(lm.model))
    ]
    torch.testing.assert_close(lm.model(TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
    outputs.zero_()
    assert (lm.model(TOKENS).logits - expected).abs().max() > 1e-3
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo"])
def test_equal_to_transformer_lens(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    config = lm.model.config
    neo = architecture == "gpt_neo"
    cfg = HookedTransformerConfig(
        n_layers=lm.n_layers,
        d_model=lm.d_model,
        n_heads=2,
        d_head=lm.d_model // 2,
        d_mlp=config.intermediate_size if neo else 4 * lm.d_model,
        n_ctx=lm.context,
        d_vocab=lm.d_vocab,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        use_attn_scale=not neo,
        use_local_attn=neo,
        attn_types=list(config.attention_layers) if neo else None,
        window_size=config.window_size if neo else None,
    )
    hooked = HookedTransformer(cfg)
    convert = convert_neo_weights if neo else convert_gpt2_weights
    hooked.load_state_dict(convert(lm.model, cfg), strict=False)
    theirs: dict[str, Tensor] = {}
    for layer, block in enumerate(hooked.blocks):
        # circuit-tracer wraps this module and names its two ends as below
        wrapper = ReplacementMLP(block.mlp)
        wrapper.hook_in.add_hook(lambda x, hook, k=layer: theirs.update({f"{k}.{FEATURE_INPUT}": x}))
        wrapper.hook_out.add_hook(lambda x, hook, k=layer: theirs.update({f"{k}.{FEATURE_OUTPUT}": x}))
        block.mlp = wrapper
    hooked(TOKENS)
    inputs, outputs = capture_mlp(lm, TOKENS)
    for layer in range(lm.n_layers):
        for name, captured in ((FEATURE_INPUT, inputs), (FEATURE_OUTPUT, outputs)):
            expected = theirs[f"{layer}.{name}"]
            torch.testing.assert_close(captured[:, :, layer], expected, atol=1e-5, rtol=0)


def test_no_logits_and_no_hooks_left(lm_of: Maker) -> None:
    lm = lm_of("llama")
    ran: list[str] = []
    lm.model.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    lm.model.lm_head.register_forward_hook(lambda *_: ran.append("unembedding"))
    capture_mlp(lm, TOKENS)
    assert ran == []
    assert all(not module._forward_hooks for module in mlps(lm.model))


def test_hooks_are_removed_when_the_model_fails(lm_of: Maker) -> None:
    lm = lm_of("gpt2")
    with pytest.raises(IndexError):
        capture_mlp(lm, torch.full((1, 4), 10_000))
    assert all(not module._forward_hooks for module in mlps(lm.model))


def test_longer_than_the_context(lm_of: Maker) -> None:
    lm = lm_of("gpt_neo")
    with pytest.raises(ConfigError, match=r"at most 32 tokens.*found 33(.|\n)*tokenize.context"):
        capture_mlp(lm, torch.ones(1, 33, dtype=torch.long))


def test_an_mlp_of_another_width_is_refused(lm_of: Maker) -> None:
    lm = lm_of("gpt2")

    def narrow(_module: object, _arguments: object, output: Tensor) -> Tensor:
        return output[..., :4]

    mlps(lm.model)[1].register_forward_hook(narrow)
    with pytest.raises(ShapeError, match="layer 1"):
        capture_mlp(lm, TOKENS)
