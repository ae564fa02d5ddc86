from pathlib import Path

import pytest
import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.replacement import ablated_logits, mlps_substituted, original_logits, replacement_logits

BOS = 1
N_FEATURES = 24


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LanguageModel:
    cfg = ModelConfig(source="folder", name=str(tiny_model_dir), revision="", dtype="float32")
    return load_language_model(cfg, toyworld=None, device=torch.device("cpu"))


@pytest.fixture
def tokens() -> torch.Tensor:
    found = torch.randint(2, 250, (3, 12), generator=torch.Generator().manual_seed(3))
    found[:, 0] = BOS
    found[1, 5] = BOS
    return found


@pytest.fixture
def transcoder(lm: LanguageModel) -> Transcoder:
    """Random weights, with thresholds low enough that many features fire."""
    clt = Transcoder(lm.n_layers, N_FEATURES, lm.d_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (clt.W_enc, clt.b_enc, clt.b_dec, *clt.W_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        clt.log_threshold.fill_(-2.0)
    return clt


@torch.no_grad()
def forward_by_hand(lm: LanguageModel, tokens: torch.Tensor, mlp_output: object) -> torch.Tensor:
    """GPT-Neo written out; `mlp_output(layer, x, inputs_so_far)` gives what each MLP's place adds."""
    inner = lm.model.transformer
    residual = inner.wte(tokens) + inner.wpe(torch.arange(tokens.shape[1]))
    inputs: list[torch.Tensor] = []
    for layer, block in enumerate(inner.h):
        residual = residual + block.attn(block.ln_1(residual))[0]
        inputs.append(block.ln_2(residual))
        residual = residual + mlp_output(layer, block, inputs)
    return lm.model.lm_head(inner.ln_f(residual))


def reconstruction_by_loops(clt: Transcoder, layer: int, inputs: list[torch.Tensor]) -> torch.Tensor:
    output = torch.zeros_like(inputs[layer]) + clt.b_dec[layer]
    for source in range(layer + 1):
        for feature in range(clt.n_features):
            pre = inputs[source] @ clt.W_enc[source, feature] + clt.b_enc[source, feature]
            activation = torch.where(pre > clt.threshold[source, feature], pre, torch.zeros_like(pre))
            output = output + activation[..., None] * clt.W_dec[source][feature, layer - source]
    return output


def test_original_logits_are_the_models(lm: LanguageModel, tokens: torch.Tensor) -> None:
    expected = forward_by_hand(lm, tokens, lambda layer, block, inputs: block.mlp(inputs[layer]))
    torch.testing.assert_close(original_logits(lm, tokens), expected, atol=1e-5, rtol=1e-5)


def test_replacement_equals_a_forward_written_out(
    lm: LanguageModel, transcoder: Transcoder, tokens: torch.Tensor
) -> None:
    def place(layer: int, block: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
        ours = reconstruction_by_loops(transcoder, layer, inputs)
        return torch.where((tokens == BOS)[..., None], block.mlp(inputs[layer]), ours)

    expected = forward_by_hand(lm, tokens, place)
    found = replacement_logits(lm, transcoder, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - original_logits(lm, tokens)).abs().max() > 0.01, "the transcoder must change something"


FORMS = {
    "plt with skip": {"topology": "plt", "skip": True},
    "clt with skip": {"skip": True},
    "offsets": {"decoder": "source", "pair_scale": True, "pair_offset": True},
    "low rank": {"decoder": "low_rank", "rank": 3},
    "molt": {"topology": "molt", "ranks": (4, 2)},
}


def random_form(lm: LanguageModel, **architecture: object) -> Transcoder:
    made = Transcoder(lm.n_layers, N_FEATURES, lm.d_model, ArchitectureConfig(**architecture))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made.log_threshold.fill_(-2.0)
    return made.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_writes_what_it_reconstructs(lm: LanguageModel, tokens: torch.Tensor, form: str) -> None:
    """Layer m's output depends on the inputs up to m alone, so the whole transcoder gives it whatever comes later."""
    made = random_form(lm, **FORMS[form])

    def place(layer: int, block: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
        later = [torch.zeros_like(inputs[0])] * (lm.n_layers - len(inputs))
        ours = made(torch.stack([*inputs, *later], dim=2).flatten(0, 1))[:, layer].view_as(inputs[layer])
        return torch.where((tokens == BOS)[..., None], block.mlp(inputs[layer]), ours)

    expected = forward_by_hand(lm, tokens, place)
    found = replacement_logits(lm, made, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - original_logits(lm, tokens)).abs().max() > 0.01


@pytest.mark.parametrize("topology", ["acausal", "sae", "crosscoder"])
def test_what_cannot_stand_for_mlps_is_refused(lm: LanguageModel, tokens: torch.Tensor, topology: str) -> None:
    with pytest.raises(ConfigError, match=f"stand for MLPs while the layers run; found topology {topology} writes"):
        replacement_logits(lm, random_form(lm, topology=topology), tokens)


@pytest.mark.parametrize("replaced", [0, 1])
def test_one_layer_alone_keeps_the_others_own_mlps(
    lm: LanguageModel, transcoder: Transcoder, tokens: torch.Tensor, replaced: int
) -> None:
    def place(layer: int, block: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
        own = block.mlp(inputs[layer])
        if layer != replaced:
            return own
        return torch.where((tokens == BOS)[..., None], own, reconstruction_by_loops(transcoder, layer, inputs))

    expected = forward_by_hand(lm, tokens, place)
    torch.testing.assert_close(
        replacement_logits(lm, transcoder, tokens, layers=[replaced]), expected, atol=1e-4, rtol=1e-4
    )


def test_a_transcoder_that_writes_nothing_is_zero_ablation(lm: LanguageModel, tokens: torch.Tensor) -> None:
    silent = Transcoder(lm.n_layers, N_FEATURES, lm.d_model)
    zeros = torch.zeros(lm.n_layers, lm.d_model)
    assert torch.equal(replacement_logits(lm, silent, tokens), ablated_logits(lm, zeros, tokens))


def test_a_transcoder_that_is_its_bias_is_that_ablation(lm: LanguageModel, tokens: torch.Tensor) -> None:
    constant = Transcoder(lm.n_layers, N_FEATURES, lm.d_model)
    mean = torch.randn(lm.n_layers, lm.d_model, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        constant.b_dec.copy_(mean)
    found = ablated_logits(lm, mean, tokens)
    torch.testing.assert_close(replacement_logits(lm, constant, tokens), found)
    assert (found - original_logits(lm, tokens)).abs().max() > 0.01


def test_bos_keeps_the_models_own_outputs(lm: LanguageModel, transcoder: Transcoder) -> None:
    only_bos = torch.full((2, 6), BOS)
    assert torch.equal(replacement_logits(lm, transcoder, only_bos), original_logits(lm, only_bos))


def test_the_substitute_reads_what_capture_stores(lm: LanguageModel, tokens: torch.Tensor) -> None:
    inputs, outputs = capture_mlp(lm, tokens)
    seen: dict[int, torch.Tensor] = {}

    def substitute(layer: int, x: torch.Tensor) -> torch.Tensor:
        seen[layer] = x
        return outputs[:, :, layer].flatten(0, 1)

    with mlps_substituted(lm, tokens, substitute):
        same = original_logits(lm, tokens)
    torch.testing.assert_close(same, original_logits(lm, tokens))
    for layer in range(lm.n_layers):
        torch.testing.assert_close(seen[layer], inputs[:, :, layer].flatten(0, 1))


def test_hooks_are_gone_after_an_error(lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = original_logits(lm, tokens)

    def broken(layer: int, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken substitute")

    with pytest.raises(RuntimeError, match="broken substitute"), mlps_substituted(lm, tokens, broken):
        original_logits(lm, tokens)
    assert all(not module._forward_hooks for module in mlps(lm.model))
    assert torch.equal(original_logits(lm, tokens), before)


def test_a_transcoder_of_another_shape_is_refused(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"expected a transcoder of 2 layers and width 16.*found 3 layers, width 16"):
        replacement_logits(lm, Transcoder(3, 4, 16), tokens)
