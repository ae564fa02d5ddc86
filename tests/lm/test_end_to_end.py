"""Values and gradients of end-to-end terms, against a forward pass written out in double precision."""

import dataclasses

import pytest
import torch
from tests.lm.conftest import ARCHITECTURES
from tests.lm.test_lens import KINDS, hooked_of, load
from tests.training.helpers import tiny
from transformers import AutoTokenizer

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig
from circuitmill.core.behaviour import Behaviour
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.end_to_end import EndToEnd
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.lens import save_lens_model
from circuitmill.lm.replacement import original_logits, replacement_logits
from circuitmill.training.objective import Moment, encoder

BOS, N_FEATURES, N_LAYERS, D_MODEL = 1, 10, 3, 16
NAMES = ("kl", "cross_entropy")


def some_tokens(seed=3, shape=(3, 9)):
    found = torch.randint(2, 250, shape, generator=torch.Generator().manual_seed(seed))
    found[:, 0] = BOS
    found[1, 5] = BOS
    return found


def some_scaling(kind="standardize", dtype=torch.float32):
    generator = torch.Generator().manual_seed(8)
    scale, center = (
        torch.rand(2, N_LAYERS, D_MODEL, generator=generator),
        torch.randn(2, N_LAYERS, D_MODEL, generator=generator),
    )
    if kind == "rms":
        return Scaling.by_layer(*(1 + scale[:, :, 0].to(dtype)), D_MODEL)
    return Scaling(*(0.5 + scale.to(dtype)), *(0.1 * center.to(dtype)))


def some_transcoder(dtype=torch.float32, **architecture):
    """Random weights with which about half of the features fire."""
    form = ArchitectureConfig(**architecture)
    coder = Transcoder(N_LAYERS, 2 * 7 if form.ranks else N_FEATURES, D_MODEL, form).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
        coder.log_threshold.mul_(0.3).sub_(1.5)
    return coder


def config(coder, **changes):
    return tiny(n_features=coder.n_features, architecture=coder.architecture, **changes)


def encode_of(coder, **changes):
    dead = torch.zeros_like(coder.log_threshold, dtype=torch.bool)
    return encoder(coder, config(coder, **changes), Moment(0, dead, torch.zeros_like(coder.log_threshold)))


def in_double(lm):
    lm.model.double()
    return lm


def measured(lm, coder, scaling, tokens):
    """KL and cross-entropy as stage evaluate has them."""
    behaviour = Behaviour()
    replaced = replacement_logits(lm, fold(coder, scaling), tokens)
    behaviour.update(original_logits(lm, tokens), replaced, tokens, BOS)
    return {"kl": behaviour.kl(), "cross_entropy": behaviour.cross_entropy()}


def test_the_first_pass_sees_what_is_cached(lm_of):
    lm, tokens, scaling = lm_of("gpt2"), some_tokens(), some_scaling()
    original = EndToEnd(lm, scaling).original(tokens)
    inputs, outputs = capture_mlp(lm, tokens)
    counted = tokens != BOS
    torch.testing.assert_close(original.x, scaling.inputs(inputs[counted]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(original.y, scaling.outputs(outputs[counted]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(original.logits, original_logits(lm, tokens)[counted], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_terms_are_those_of_the_finished_transcoder(lm_of, architecture):
    lm, tokens, scaling, coder = lm_of(architecture), some_tokens(), some_scaling(), some_transcoder()
    model = EndToEnd(lm, scaling)
    found = model.terms(coder, encode_of(coder), model.original(tokens), NAMES)
    expected = measured(lm, coder, scaling, tokens)
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)
    assert found["kl"] > 1e-3


@pytest.mark.parametrize(
    "form",
    [
        {"topology": "plt"},
        {"topology": "plt", "skip": True},
        {"topology": "molt", "ranks": (4, 2, 1)},
        {"skip": True},
        {"decoder": "target", "pair_scale": True, "pair_offset": True},
        {"decoder": "low_rank", "rank": 3},
    ],
    ids=str,
)
def test_other_architectures(lm_of, form):
    lm, tokens, coder = lm_of("gpt2"), some_tokens(), some_transcoder(**form)
    scaling = some_scaling("rms")
    model = EndToEnd(lm, scaling)
    found = model.terms(coder, encode_of(coder), model.original(tokens), NAMES)
    expected = measured(lm, coder, scaling, tokens)
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_models_of_transformer_lens(kind, tmp_path, tiny_model_dir):
    save_lens_model(hooked_of(kind), AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / kind)
    lm, tokens, scaling, coder = load(tmp_path / kind), some_tokens(), some_scaling(), some_transcoder()
    model = EndToEnd(lm, scaling)
    found = model.terms(coder, encode_of(coder), model.original(tokens), NAMES)
    expected = measured(lm, coder, scaling, tokens)
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)


def activation_by_hand(pre, log_threshold, bandwidth):
    """JumpReLU; a product that is zero carries the straight-through derivative by the threshold."""
    theta = log_threshold.exp()
    near = ((pre - theta).detach().abs() < bandwidth / 2).double()
    return pre * (pre > theta) - theta.detach() / bandwidth * near * (theta - theta.detach())


def gpt2_by_hand(lm, tokens, coder, scaling, bandwidth):
    """Logits, with each MLP outside BOS replaced by sums over sources in raw units."""
    body = lm.model.transformer
    stream = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
    active = []
    for layer, block in enumerate(body.h):
        stream = stream + block.attn(block.ln_1(stream))[0]
        raw = block.ln_2(stream)
        x = (raw - scaling.input_center[layer]) * scaling.input_scale[layer]
        pre = x @ coder.W_enc[layer].T + coder.b_enc[layer]
        active.append(activation_by_hand(pre, coder.log_threshold[layer], bandwidth))
        y_hat = coder.b_dec[layer] + x @ coder.W_skip[layer].T
        for source in range(layer + 1):
            y_hat = y_hat + active[source] @ coder.W_dec[source][:, layer - source]
        written = y_hat / scaling.output_scale[layer] + scaling.output_center[layer]
        stream = stream + torch.where((tokens == BOS)[..., None], block.mlp(raw), written)
    return lm.model.lm_head(body.ln_f(stream))


def terms_by_hand(lm, tokens, logits):
    """One position at a time."""
    with torch.no_grad():
        log_p = lm.model(tokens).logits.log_softmax(-1)
    log_q = logits.log_softmax(-1)
    kl, surprise = [], []
    for row in range(tokens.shape[0]):
        for pos in range(tokens.shape[1]):
            if tokens[row, pos] == BOS:
                continue
            kl.append((log_p[row, pos].exp() * (log_p[row, pos] - log_q[row, pos])).sum())
            if pos + 1 < tokens.shape[1] and tokens[row, pos + 1] != BOS:
                surprise.append(-log_q[row, pos, tokens[row, pos + 1]])
    return {"kl": torch.stack(kl).mean(), "cross_entropy": torch.stack(surprise).mean()}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_forward_written_out(lm_of, name):
    lm, tokens = in_double(lm_of("gpt2")), some_tokens()
    scaling, coder = some_scaling(dtype=torch.float64), some_transcoder(torch.float64, skip=True)
    model, parameters = EndToEnd(lm, scaling), dict(coder.named_parameters())
    encode = encode_of(coder, nonlinearity=NonlinearityConfig("jumprelu", bandwidth=0.4))
    ours = model.terms(coder, encode, model.original(tokens), [name])[name]
    theirs = terms_by_hand(lm, tokens, gpt2_by_hand(lm, tokens, coder, scaling, 0.4))[name]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(value, list(parameters.values())) for value in (ours, theirs)]
    for key, one, other in zip(parameters, *gradients, strict=True):
        assert one.abs().max() > 1e-8, key
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(lm_of, name):
    lm, tokens = in_double(lm_of("gpt2")), some_tokens()
    coder = some_transcoder(torch.float64, skip=True)
    model = EndToEnd(lm, some_scaling(dtype=torch.float64))
    original = model.original(tokens)
    smooth = [parameter for key, parameter in coder.named_parameters() if key != "log_threshold"]

    def value():
        return model.terms(coder, encode_of(coder), original, [name])[name]

    for index, gradient in enumerate(torch.autograd.grad(value(), smooth)):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(index), dtype=gradient.dtype)
        with torch.no_grad():
            smooth[index].add_(1e-6 * direction)
            above = value()
            smooth[index].sub_(2e-6 * direction)
            difference = (above - value()) / 2e-6
            smooth[index].add_(1e-6 * direction)
        expected = (gradient * direction).sum().item()
        assert difference.item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_kept_numbers_are_of_the_tokens_that_count(lm_of):
    """A top-k kind that shares places between tokens must not see BOS."""
    lm, tokens, coder = lm_of("gpt2"), some_tokens(), some_transcoder()
    model, seen = EndToEnd(lm, some_scaling()), []
    inner = encode_of(coder, nonlinearity=NonlinearityConfig("batch_topk", k=2.0))

    def encode(source, x):
        a = inner(source, x)
        seen.append((source, len(x), int(a.firings().sum())))
        return a

    model.terms(coder, encode, model.original(tokens), ["kl"])["kl"].backward()
    counted = int((tokens != BOS).sum())
    assert seen == [(layer, counted, 2 * counted) for layer in range(N_LAYERS)]
    assert coder.W_enc.grad.abs().sum() > 0


def test_the_model_is_frozen_and_as_it_was(lm_of):
    lm, tokens, coder = lm_of("gpt2"), some_tokens(), some_transcoder()
    lm.model.requires_grad_(True)
    before = original_logits(lm, tokens)
    model = EndToEnd(lm, some_scaling())
    model.terms(coder, encode_of(coder), model.original(tokens), ["kl"])["kl"].backward()
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert torch.equal(original_logits(lm, tokens), before)

    def broken(source, x):
        raise RuntimeError("broken encoder")

    with pytest.raises(RuntimeError, match="broken encoder"):
        model.terms(coder, broken, model.original(tokens), ["kl"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in mlps(lm.model))


def test_the_model_keeps_its_precision_under_autocast(lm_of):
    lm, tokens, coder = lm_of("gpt2"), some_tokens(), some_transcoder()
    model, seen = EndToEnd(lm, some_scaling()), []
    handle = lm.model.transformer.h[0].attn.register_forward_hook(lambda *call: seen.append(call[2][0].dtype))
    inner = encode_of(coder)

    def encode(source, x):
        seen.append((x @ x.T).dtype)
        return inner(source, x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        original = model.original(tokens)
        found = model.terms(coder, encode, original, ["kl"])["kl"]
    handle.remove()
    exact = model.terms(coder, inner, original, ["kl"])["kl"]
    assert seen == [torch.float32, torch.float32, *[torch.bfloat16] * N_LAYERS]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=0.05)


def test_only_what_can_be_asked_for(lm_of):
    lm, tokens, coder = lm_of("gpt2"), some_tokens(), some_transcoder()
    model = EndToEnd(lm, some_scaling())
    with pytest.raises(ConfigError, match="kl or cross_entropy; found l1"):
        model.terms(coder, encode_of(coder), model.original(tokens), ["l1", "kl"])
    other = Transcoder(N_LAYERS + 1, N_FEATURES, D_MODEL)
    with pytest.raises(ShapeError, match="transcoder of 3 layers and width 16"):
        model.terms(other, encode_of(coder), model.original(tokens), ["kl"])


@pytest.mark.parametrize(
    "own",
    [
        NonlinearityConfig("token_topk", k=2.0),
        NonlinearityConfig("batch_topk_all", k=2.0),
        NonlinearityConfig("tests.lm.test_end_to_end:activation_by_hand"),
    ],
    ids=lambda own: own.name,
)
def test_nonlinearities_over_all_layers_are_refused_before_any_job(own):
    with pytest.raises(ConfigError, match=r"works on one layer at a time with cross_entropy or kl.*\n.*nonlinearity"):
        tiny(nonlinearity=own, loss__kl=TermConfig(1.0))
    assert dataclasses.replace(tiny(loss__kl=TermConfig(0.0)), nonlinearity=own).nonlinearity == own
