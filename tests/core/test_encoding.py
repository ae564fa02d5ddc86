"""The few places that matter give what all places give: values, gradients and every term of the loss."""

import dataclasses

import pytest
import torch
from tests.core.test_transcoder import random_transcoder
from tests.training.helpers import tiny

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import TERMS, NonlinearityConfig, TermConfig
from circuitmill.core import encoding
from circuitmill.core.encoding import Encoding, encode, sources_of
from circuitmill.core.losses import strongest
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.core.parts import WHOLE
from circuitmill.kernels import reference
from circuitmill.kernels.sparse import Sparse
from circuitmill.training import objective

TOKENS, LAYERS, FEATURES, WIDTH = 13, 3, 8, 5
KINDS = {
    "relu": 0.0,
    "jumprelu": 0.0,
    "topk": 2.0,
    "token_topk": 1.5,
    "batch_topk": 1.3,
    "batch_topk_all": 1.7,
    "groupmax": 2.0,
}
OWN_TERMS = {
    "reconstruction": TermConfig(1.0),
    "tanh_sparsity": TermConfig(0.4, scale=1.3),
    "l1": TermConfig(0.3, norm="summed"),
    "auxiliary": TermConfig(0.2, k=2),
    "pre_activation": TermConfig(0.1),
}
BY_THRESHOLD = {"quadratic_l0": TermConfig(0.2, target=2.0), "frequency": TermConfig(0.3, scale=0.1)}


@pytest.fixture
def pair():
    torch.manual_seed(3)
    return [torch.randn(TOKENS, LAYERS, WIDTH, dtype=torch.float64) for _ in range(2)]


def coder(topology="clt", prefixes=()):
    torch.manual_seed(5)
    form = ArchitectureConfig(topology=topology, prefixes=prefixes)
    return random_transcoder(LAYERS, FEATURES, WIDTH, architecture=form)


def result_of(clt, pair, name, way, **own):
    form = clt.architecture
    terms = OWN_TERMS | (BY_THRESHOLD if name == "jumprelu" else {})
    cfg = tiny(
        nonlinearity=NonlinearityConfig(name, k=KINDS[name], **own),
        loss=terms,
        architecture=form,
        n_features=FEATURES,
        products=way,
    )
    torch.manual_seed(1)
    dead = torch.rand(clt.n_sources, FEATURES) < 0.4
    density = torch.rand(clt.n_sources, FEATURES, dtype=torch.float64)
    return objective.evaluate_batch(clt, *pair, cfg, objective.Moment(cfg.tokens, dead, density))


@pytest.mark.parametrize("topology", ["clt", "crosscoder"])
@pytest.mark.parametrize("name", KINDS)
def test_few_places_give_what_all_places_give(pair, name, topology):
    clt = coder(topology, prefixes=(3, FEATURES))
    few, all_ = (result_of(clt, pair, name, way) for way in ("sparse", "dense"))
    assert set(few.sparse) == {True} and set(all_.sparse) == {False}
    assert set(few.terms) >= set(OWN_TERMS) and set(OWN_TERMS) | set(BY_THRESHOLD) < set(TERMS)
    for term, value in all_.terms.items():
        torch.testing.assert_close(few.terms[term], value, rtol=1e-10, atol=1e-10, msg=term)
    assert few.firings.tolist() == all_.firings.tolist() and few.firings.sum() > 0
    torch.testing.assert_close(few.least, all_.least)
    torch.testing.assert_close(few.y_hat, all_.y_hat, rtol=0, atol=1e-10)
    names = [own for own, parameter in clt.named_parameters() if parameter.requires_grad]
    ways = [torch.autograd.grad(one.loss, list(clt.parameters()), allow_unused=True) for one in (few, all_)]
    for own, one, other in zip(names, *ways, strict=True):
        assert (one is None) == (other is None), own
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=own)


@pytest.mark.parametrize("own", [{"pass_through": True}, {"bandwidth": 0.2}, {"threshold_derivative": "direct"}])
def test_the_kernel_of_the_threshold_is_exact(pair, own):
    clt = coder()
    ways = [
        torch.autograd.grad(result_of(clt, pair, "jumprelu", way, **own).loss, [clt.log_threshold, clt.b_enc])
        for way in ("sparse", "dense")
    ]
    for one, other in zip(*ways, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_kernel_on_some_tokens_is_right_on_average(pair):
    clt = coder()

    def gradients(stride, offset):
        settings = Settings(bandwidth=2.0, band_stride=stride, band_offset=offset, most=1.0)
        encodings = encode(sources_of(clt, pair[0]), "jumprelu", settings)
        loss = torch.stack(
            [one.a.times(clt.decoder_block(s).flatten(1)).square().sum() for s, one in enumerate(encodings)]
        )
        places = sum(len(one.pre.entries) for one in encodings if isinstance(one.pre, Sparse))
        return places, torch.autograd.grad(loss.sum(), list(clt.parameters()), allow_unused=True)

    places, exact = gradients(1, 0)
    found = [gradients(3, offset) for offset in range(3)]
    assert all(own < places for own, _ in found)
    for index, gradient in enumerate(exact):
        if gradient is not None:
            torch.testing.assert_close(sum(own[index] for _, own in found) / 3, gradient, rtol=0, atol=1e-10)
    threshold = [name for name, _ in clt.named_parameters()].index("log_threshold")
    assert not torch.allclose(found[0][1][threshold], exact[threshold])


@pytest.mark.parametrize("name", ["topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax"])
def test_equal_numbers_are_kept_in_the_same_order(name):
    """Encoders of copies give ties everywhere."""
    clt, k = coder(), 2.0 if name == "groupmax" else 3.0
    with torch.no_grad():
        # whole numbers, so that equal products are equal to the last bit
        clt.W_enc.copy_(clt.W_enc[:1, :1].mul(4).round().expand_as(clt.W_enc))
        clt.b_enc.zero_()
    x = torch.randn(6, 1, WIDTH, dtype=torch.float64).mul(4).round().expand(-1, LAYERS, -1)
    encodings = encode(sources_of(clt, x), name, Settings(k=k, most=1.0))
    pre = torch.stack([one.dense_pre for one in encodings], dim=1)
    assert torch.equal(pre, pre[:, :1, :1].expand_as(pre))
    expected = NONLINEARITIES[name](pre, clt.log_threshold, Settings(k=k))
    found = torch.stack([one.a.dense() for one in encodings], dim=1)
    assert torch.equal(found, expected) and (expected > 0).any()


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("most", [1.0, 0.2])
def test_a_kernel_that_finds_places_gives_the_same(pair, name, stride, most, monkeypatch):
    """As on a GPU: places come from one operator, without a matrix, or there are too many."""
    clt, settings = coder(), Settings(bandwidth=2.0, band_stride=stride, band_offset=stride - 1, most=1.0)
    plain = encode(sources_of(clt, pair[0]), name, settings)
    monkeypatch.setattr(encoding, "_has_kernel", lambda source: True)

    def above(x, weight, bias, floor, limit):
        return reference.above(x, weight, bias, floor, torch.full_like(x[:, 0], -torch.inf), limit)

    monkeypatch.setattr(encoding.operators, "above", above)
    fused = encode(sources_of(clt, pair[0]), name, dataclasses.replace(settings, most=most))
    for one, other in zip(plain, fused, strict=True):
        assert other.sparse == (most == 1.0)
        torch.testing.assert_close(other.a.dense(), one.a.dense(), rtol=0, atol=1e-12)
        if other.sparse:
            assert other.pre.entries.feature.tolist() == one.pre.entries.feature.tolist()
            assert other.pre.entries.offsets.tolist() == one.pre.entries.offsets.tolist()


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_many_places_are_left_to_the_dense_product(pair, name):
    clt = coder()
    with torch.no_grad():
        clt.b_enc.copy_(torch.tensor([[-2.0], [0.5], [2.0]]).expand_as(clt.b_enc))
    pre = clt.pre_activations(pair[0])
    floor = clt.threshold - 0.3 / 2 if name == "jumprelu" else torch.zeros_like(clt.threshold)
    share = (pre > floor).double().mean(dim=(0, 2)).tolist()
    assert min(share) < 0.5 < max(share)
    for most in (0.0, 0.5, 1.0):
        encodings = encode(sources_of(clt, pair[0]), name, Settings(bandwidth=0.3, most=most))
        assert [one.sparse for one in encodings] == [own <= most for own in share]


def test_pre_activations_of_all_places_are_there_for_who_asks(pair):
    clt = coder()
    one, *_ = encode(sources_of(clt, pair[0]), "topk", Settings(k=2.0, most=1.0))
    assert isinstance(one, Encoding) and one.sparse
    torch.testing.assert_close(one.dense_pre, clt.pre_activations(pair[0])[:, 0])
    (gradient,) = torch.autograd.grad(one.dense_pre.sum(), clt.b_enc)
    assert gradient[0].tolist() == [TOKENS] * FEATURES and not gradient[1:].any()


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("most", [1.0, -1.0], ids=["sparse", "dense"])
def test_strongest_are_the_largest_positive_ones_among_the_allowed(pair, k, most):
    clt = coder()
    allowed = torch.tensor([True, False, True, True, False, True, False, False])
    one, *_ = encode(sources_of(clt, pair[0]), "jumprelu", Settings(most=most))
    pre = clt.pre_activations(pair[0])[:, 0]
    expected = torch.zeros_like(pre, dtype=torch.bool)
    for token in range(TOKENS):
        places = sorted((i for i in range(FEATURES) if allowed[i] and pre[token, i] > 0), key=lambda i: -pre[token, i])
        expected[token, places[:k]] = True
    entries = strongest(one, k, allowed, WHOLE)
    assert torch.stack([entries.token, entries.feature]).tolist() == expected.nonzero().T.tolist()
    torch.testing.assert_close(one.at(entries), pre[expected])
    none = strongest(one, k, torch.zeros(FEATURES, dtype=torch.bool), WHOLE)
    assert len(none) == 0 and none.n_tokens == TOKENS
