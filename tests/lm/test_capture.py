from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import FAMILIES, mlps
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
def test_positions_that_are_left_out_change_nothing_else(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    for keep in (TOKENS % 3 > 0, torch.ones_like(TOKENS, dtype=torch.bool), torch.zeros_like(TOKENS, dtype=torch.bool)):
        for kept, everything in zip(capture_mlp(lm, TOKENS, keep), capture_mlp(lm, TOKENS), strict=True):
            assert torch.equal(kept, everything[keep])


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
