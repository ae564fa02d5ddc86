from pathlib import Path

import pytest
import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.measure import changed_models, measure_behaviour, measure_fit, measure_one_layer
from circuitmill.lm.replacement import original_logits
from circuitmill.lm.sites import Sites

BOS = 1


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LanguageModel:
    cfg = ModelConfig(source="folder", name=str(tiny_model_dir), revision="", dtype="float32")
    return load_language_model(cfg, toyworld=None, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    found = torch.randint(2, 250, (6, 10), generator=torch.Generator().manual_seed(3))
    found[:, 0] = BOS
    found[2, 4] = BOS
    return found


@pytest.fixture(scope="module")
def clt(lm: LanguageModel) -> Transcoder:
    transcoder = Transcoder(lm.n_layers, 5, lm.d_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (transcoder.W_enc, transcoder.b_dec, *transcoder.W_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        transcoder.log_threshold.fill_(-1.0)
    return transcoder


def test_batches_do_not_matter_and_bos_is_left_out(lm: LanguageModel, clt: Transcoder, tokens: torch.Tensor) -> None:
    whole, parts = measure_fit(lm, clt, [tokens]), measure_fit(lm, clt, tokens.split(2))
    assert whole.firing.n_tokens == parts.firing.n_tokens == int((tokens != BOS).sum()) == 53
    torch.testing.assert_close(whole.explained.per_layer(), parts.explained.per_layer(), atol=1e-6, rtol=1e-6)
    outputs = capture_mlp(lm, tokens)[1][tokens != BOS]
    torch.testing.assert_close(whole.mean_outputs, outputs.mean(0), atol=1e-6, rtol=1e-4)


def test_what_reads_a_hookpoint_is_measured_against_it(lm: LanguageModel, tokens: torch.Tensor) -> None:
    coder = Transcoder(2, 5, lm.d_model, ArchitectureConfig(topology="crosscoder"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (coder.W_enc, coder.b_dec, *coder.W_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        coder.log_threshold.fill_(-1.0)
    sites = Sites((lm,), "resid_pre", ((0, 1),))
    found = measure_fit(sites, coder, tokens.split(2))
    x = sites(tokens, tokens != BOS)[0]
    features = coder.encode(x)
    assert found.firing.n_active.tolist() == (features > 0).sum(dim=0).tolist()
    error = (x - coder.decode(features)).square().sum(dim=(0, 2)) / (x - x.mean(0)).square().sum(dim=(0, 2))
    torch.testing.assert_close(found.explained.per_layer().float(), (1 - error).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean_outputs, x.mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", [{"skip": True}, {"topology": "molt", "ranks": (2,)}])
def test_reconstruction_takes_what_was_read_along(lm: LanguageModel, tokens: torch.Tensor, form: dict) -> None:
    made = Transcoder(2, 5, lm.d_model, ArchitectureConfig(**form)).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    found = measure_fit(lm, made, [tokens])
    x, y = (side[tokens != BOS] for side in capture_mlp(lm, tokens))
    error = (y - made(x)).double().square().sum(dim=(0, 2))
    torch.testing.assert_close(found.explained.error, error, atol=1e-6, rtol=1e-5)


def test_the_model_itself_loses_nothing(lm: LanguageModel, tokens: torch.Tensor) -> None:
    found = measure_behaviour(lm, {"same": lambda batch: original_logits(lm, batch)}, tokens.split(3))["same"]
    assert (found.agreement(), found.kl(), found.n_tokens) == (1.0, 0.0, 53)


def test_one_layer_at_a_time_is_each_layer_alone(lm: LanguageModel, clt: Transcoder, tokens: torch.Tensor) -> None:
    mean = measure_fit(lm, clt, [tokens]).mean_outputs
    found = measure_one_layer(lm, clt, mean, tokens.split(4))
    for layer in range(lm.n_layers):
        alone = measure_behaviour(lm, changed_models(lm, clt, mean, (layer,)), [tokens])
        assert found[layer]["layer"] == layer
        for name, behaviour in alone.items():
            assert found[layer][name]["kl"] == pytest.approx(behaviour.kl(), rel=1e-4, abs=1e-9)
    everything = measure_behaviour(lm, changed_models(lm, clt, mean), [tokens])["replacement"]
    assert everything.kl() != pytest.approx(found[0]["replacement"]["kl"], rel=1e-3)


def test_a_transcoder_of_another_width_is_refused(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="found 2 layers, width 8"):
        measure_fit(lm, Transcoder(2, 3, 8), [tokens])
