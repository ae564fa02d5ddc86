import pytest
import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.adapters import Adapted, adapt, merged, unfold
from circuitmill.core.decoders import LowRank
from circuitmill.core.operand import Dense
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.kernels.entries import places
from circuitmill.kernels.sparse import Sparse

N_LAYERS, D_MODEL, N_TOKENS = 4, 5, 11
FORMS = {
    "clt": {},
    "clt-skip": {"skip": True},
    "matryoshka": {"prefixes": (2, 7)},
    "plt": {"topology": "plt"},
    "sae": {"topology": "sae"},
    "acausal": {"topology": "acausal"},
    "crosscoder": {"topology": "crosscoder"},
    "two-models": {"topology": "crosscoder", "models": 2},
    "target": {"decoder": "target"},
    "target-scaled": {"decoder": "target", "pair_scale": True},
    "source": {"decoder": "source", "pair_scale": True},
    "low-rank": {"decoder": "low_rank", "rank": 2},
}
WITHOUT_VECTORS = {
    "target-offset": {"decoder": "target", "pair_scale": True, "pair_offset": True},
    "source-offset": {"decoder": "source", "pair_scale": True, "pair_offset": True},
    "molt": {"topology": "molt", "ranks": (3, 2, 1)},
}
BY_LAYER = ("source", "source-offset", "molt")
"""Those that hold no scale or center per dimension."""


def finished(form, dtype=torch.float32):
    """A transcoder with random parameters, without gradients, as a store gives it."""
    coder = Transcoder(N_LAYERS, 7, D_MODEL, ArchitectureConfig(**form)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        coder.log_threshold.mul_(0.3).sub_(1)
    return coder.requires_grad_(False)


def inputs(dtype=torch.float32):
    return torch.randn(N_TOKENS, N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=dtype)


def some_scaling(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    scale = 0.2 + 3 * torch.rand(2, N_LAYERS, D_MODEL, generator=generator).to(dtype)
    if kind == "rms":
        return Scaling.by_layer(scale[0, :, 0], scale[1, :, 0], D_MODEL)
    return Scaling(*scale, *torch.randn(2, N_LAYERS, D_MODEL, generator=generator).to(dtype))


def adapted(form, dtype=torch.float32):
    """An adapter in the middle of a training."""
    coder = adapt(finished(form, dtype), 3, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        change = coder.decoder.change.P
        change.copy_(torch.randn(change.shape, generator=torch.Generator().manual_seed(5), dtype=dtype))
    return coder


@pytest.mark.parametrize("kind", ["rms", "standardize"])
@pytest.mark.parametrize("name", [*FORMS, *WITHOUT_VECTORS])
def test_unfolded_on_normalised_equals_finished_on_raw(name, kind):
    coder, scaling, raw = finished((FORMS | WITHOUT_VECTORS)[name]), some_scaling(kind), inputs()
    before = {key: value.clone() for key, value in coder.state_dict().items()}
    if kind == "standardize" and name in BY_LAYER:
        with pytest.raises(ShapeError, match=r"(?s)(one factor per layer|center zero for transforms).*scaling rms"):
            unfold(coder, scaling)
        return
    found = unfold(coder, scaling)
    torch.testing.assert_close(found.encode(scaling.inputs(raw)), coder.encode(raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(scaling.inputs(raw)), scaling.outputs(coder(raw)), rtol=1e-5, atol=3e-5)
    again = fold(found, scaling)
    assert again.architecture == coder.architecture
    for key, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, before[key], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in coder.state_dict().items()), "the base is kept"


def test_unfolding_a_crosscoder_that_was_trained_with_shared_decoders():
    coder = finished({"topology": "crosscoder", "models": 2, "shared": 3})
    scaling = some_scaling("standardize")
    found = unfold(fold(coder, scaling), scaling)
    torch.testing.assert_close(found(inputs()), coder(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_an_adapter_starts_as_the_base(name):
    coder, base = adapt(finished(FORMS[name]), 3, generator=torch.Generator().manual_seed(4)), finished(FORMS[name])
    assert torch.equal(coder(inputs()), base(inputs()))
    torch.testing.assert_close(coder.decoder_norms(), base.decoder_norms())
    spread = coder.decoder.change.Q.std().item()
    assert spread == pytest.approx(3**-0.5, rel=0.2)


@pytest.mark.parametrize("name", FORMS)
def test_only_both_halves_of_the_change_are_trained(name):
    coder = adapted(FORMS[name])
    coder(inputs()).square().sum().backward()
    trained = {key for key, parameter in coder.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder.change.Q", "decoder.change.P"}
    for key, parameter in coder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (key in trained), key


def blocks_by_loops(coder, source):
    """W_dec^{s->m} + Q^s P^{s,m}, one feature and target at a time."""
    decoder, pairs = coder.decoder, list(coder.topology.pairs(source))
    block = decoder.base.block(source)
    found = torch.zeros_like(block)
    for feature in range(block.shape[0]):
        for target in range(block.shape[1]):
            change = decoder.change.Q[source, feature] @ decoder.change.P[pairs[target]]
            found[feature, target] = block[feature, target] + change
    return found


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_and_its_gradient_equal_the_loop(name):
    coder = adapted(FORMS[name], torch.float64)
    decoder, trained = coder.decoder, [coder.decoder.change.Q, coder.decoder.change.P]
    for source in range(coder.n_sources):
        a = torch.rand(N_TOKENS, 7, dtype=torch.float64) * (torch.rand(N_TOKENS, 7) > 0.5)
        block = blocks_by_loops(coder, source)
        expected = torch.einsum("nf,ftd->ntd", a, block)
        torch.testing.assert_close(decoder.block(source), block)
        torch.testing.assert_close(decoder.block(source, slice(2, 5)), block[2:5])
        entries = places(a > 0)
        for operand in (Dense(a), Sparse(entries, entries.gather(a))):
            written = decoder.written(source, operand)
            torch.testing.assert_close(written, expected)
            ours = torch.autograd.grad(written.square().sum(), trained, retain_graph=True)
            theirs = torch.autograd.grad(expected.square().sum(), trained, retain_graph=True)
            for one, other in zip(ours, theirs, strict=True):
                assert one.any()
                torch.testing.assert_close(one, other)
        part = decoder.written(source, Dense(a).within(slice(2, 5)), span=slice(2, 5))
        torch.testing.assert_close(part, torch.einsum("nf,ftd->ntd", a[:, 2:5], block[2:5]))
        norms, slow = decoder.target_norms(source), torch.linalg.vector_norm(block, dim=2)
        torch.testing.assert_close(norms, slow)
        for one, other in zip(
            torch.autograd.grad(norms.square().cos().sum(), trained, retain_graph=True),
            torch.autograd.grad(slow.square().cos().sum(), trained, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["clt", "target-scaled", "low-rank"])
def test_gradients_equal_finite_differences(name):
    coder, x = adapted(FORMS[name], torch.float64), inputs(torch.float64)
    trained = [coder.decoder.change.Q, coder.decoder.change.P]

    def value(*_):
        return coder(x).square().sum() + coder.decoder_norms().sum()

    assert torch.autograd.gradcheck(value, trained)


def test_a_base_that_writes_nothing_has_finite_gradients():
    coder = finished({})
    for block in coder.W_dec:
        block.zero_()
    coder = adapt(coder, 2, generator=torch.Generator().manual_seed(0))
    coder.decoder_norms().sum().backward()
    assert not coder.decoder_norms().any()
    assert all(bool(torch.isfinite(p.grad).all()) for p in coder.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FORMS)
def test_merged_equals_adapted(name):
    coder, x = adapted(FORMS[name]), inputs()
    plain = merged(coder)
    assert not isinstance(plain.decoder, Adapted)
    assert isinstance(plain.decoder, LowRank) == (name == "low-rank")
    rebuilt = Transcoder(N_LAYERS, 7, D_MODEL, plain.architecture)
    rebuilt.load_state_dict(plain.state_dict())
    assert plain.architecture.prefixes == coder.architecture.prefixes
    torch.testing.assert_close(rebuilt.encode(x), coder.encode(x), rtol=0, atol=0)
    expected = coder(x)
    assert (rebuilt(x) - expected).norm() <= 1e-6 * expected.norm()
    assert not any(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("name", FORMS)
def test_folding_and_merging_can_be_done_in_either_order(name):
    coder, scaling = adapted(FORMS[name], torch.float64), some_scaling("rms", torch.float64)
    one, other = merged(fold(coder, scaling)), fold(merged(coder), scaling)
    x = inputs(torch.float64)
    torch.testing.assert_close(one(x), other(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one(x), scaling.raw_outputs(coder(scaling.inputs(x))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_VECTORS)
def test_what_has_no_vectors_is_refused(name):
    with pytest.raises(ConfigError, match=r"(?s)a vector times their activation; found (topology molt|pair_offset)"):
        adapt(finished(WITHOUT_VECTORS[name]), 2, generator=torch.Generator())


def test_merging_without_an_adapter_is_refused():
    with pytest.raises(ShapeError, match="a transcoder with an adapter; found Untied"):
        merged(finished({}))
