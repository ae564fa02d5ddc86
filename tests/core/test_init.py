import math
import typing

import pytest
import torch
from tests.core.coders import ROWS, random_transcoder, sizes_of, tokens_for

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import InitConfig
from circuitmill.core import init
from circuitmill.core.mixture import Mixture
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError

WITH_VECTORS = [row for row, form in ROWS.items() if form.topology != "molt" and not form.pair_offset]


def started(form, how="uniform", seed=0, n_layers=3, n_features=48, d_model=8):
    coder = Transcoder(*sizes_of(form, n_layers, n_features, d_model), architecture=form)
    init.INITIALISERS[how](coder, generator=torch.Generator().manual_seed(seed))
    return coder


@pytest.fixture
def clt():
    return started(ROWS["clt"])


def assert_uniform(tensor, bound):
    """Within the bound, near to it, and with its spread."""
    assert tensor.abs().max().item() <= bound * (1 + 1e-6)
    if tensor.numel() >= 300:
        assert tensor.abs().max().item() == pytest.approx(bound, rel=0.03)
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert tensor.mean().item() == pytest.approx(0, abs=0.1 * bound)


def test_the_configuration_names_the_initialisers():
    assert set(typing.get_args(typing.get_type_hints(InitConfig)["weights"])) == set(init.INITIALISERS)


@pytest.mark.parametrize("row", ROWS)
def test_bounds_of_the_uniform_start(row):
    coder = started(ROWS[row])
    bound = 1 / math.sqrt(coder.n_layers * coder.d_model)
    assert_uniform(coder.W_enc, 1 / math.sqrt(coder.n_features))
    decoder = coder.decoder
    if isinstance(decoder, Mixture):
        for layer in range(coder.n_layers):
            low = 0
            for count, rank in decoder.groups:
                for side in (decoder.U, decoder.V):
                    assert_uniform(side[layer, low : low + count * rank], math.sqrt(6 / (rank + coder.d_model)))
                low += count * rank
            assert low == decoder.U.shape[1]
    elif coder.architecture.decoder == "low_rank":
        for source in range(coder.n_sources):
            block = coder.decoder_block(source)
            assert block.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    else:
        for name, parameter in decoder.named_parameters():
            if name.startswith("pair_"):
                assert (parameter == (1 if name == "pair_scale" else 0)).all()
            else:
                assert_uniform(parameter, bound)
    assert not coder.b_enc.any() and not coder.b_dec.any() and not coder.log_threshold.any()
    assert coder.W_skip is None or not coder.W_skip.any()


@pytest.mark.parametrize("row", WITH_VECTORS)
@pytest.mark.parametrize("how", ["transpose", "january_2025"])
def test_encoders_are_the_transpose_of_what_is_written_to_the_layer_read(row, how):
    coder = started(ROWS[row], how)
    factor = 1.0 if how == "transpose" else coder.d_model / coder.n_features
    for source in range(coder.n_sources):
        block = coder.decoder_block(source)
        layers = range(coder.n_layers) if coder.architecture.topology == "crosscoder" else [source]
        for row_, layer in zip(coder.topology.encoders(source), layers, strict=True):
            index = coder.topology.writes[source].index(layer)
            torch.testing.assert_close(coder.W_enc[row_], factor * block[:, index], rtol=1e-6, atol=0)
            assert coder.W_enc[row_].abs().min() > 0


def test_the_transpose_has_the_decoder_of_the_uniform_start(clt):
    transposed = started(ROWS["clt"], "transpose")
    for one, other in zip(clt.W_dec, transposed.W_dec, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("row", ["molt", "source pairs"])
@pytest.mark.parametrize("how", ["transpose", "january_2025"])
def test_without_vectors_there_is_no_transpose(row, how):
    with pytest.raises(ShapeError, match=r"features that write a vector|decoders without offsets"):
        started(ROWS[row], how)


@pytest.mark.parametrize("row", ["clt", "acausal", "plt", "sae"])
def test_scales_of_january_2025(row):
    coder = started(ROWS[row], "january_2025")
    own, other = 1 / math.sqrt(8), 1 / math.sqrt(3 * 8)
    for source, targets in enumerate(coder.topology.writes):
        for index, target in enumerate(targets):
            assert_uniform(coder.W_dec[source][:, index], own if target == source else other)
        assert_uniform(coder.W_enc[source], 8 / 48 * own)


@pytest.mark.parametrize("topology", ["clt", "acausal"])
def test_scales_of_january_2025_through_a_few_numbers(topology):
    coder = started(ArchitectureConfig(topology, decoder="low_rank", rank=32), "january_2025", n_features=100)
    for source, targets in enumerate(coder.topology.writes):
        for index, target in enumerate(targets):
            bound = 1 / math.sqrt(8) if target == source else 1 / math.sqrt(3 * 8)
            spread = coder.decoder_block(source)[:, index].std().item()
            assert spread == pytest.approx(bound / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize("row", ["crosscoder", "crosscoder shared"])
def test_a_crosscoder_has_the_larger_scale_everywhere(row):
    coder = started(ROWS[row], "january_2025")
    for name, parameter in coder.decoder.named_parameters():
        if parameter.numel() >= 300 or name == "W_shared":
            assert_uniform(parameter, 1 / math.sqrt(8))


@pytest.mark.parametrize("how", init.INITIALISERS)
def test_the_seed_decides(how):
    one, same, other = (started(ROWS["low rank"], how, seed) for seed in (0, 0, 1))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(same.named_parameters())[name])
    assert not torch.equal(one.W_enc, other.W_enc)


@pytest.mark.parametrize("row", ["clt", "crosscoder", "crosscoder shared", "molt"])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 0.999])
def test_every_feature_fires_at_the_rate(row, rate):
    coder = started(ROWS[row], n_layers=2, n_features=300)
    with torch.no_grad():
        coder.log_threshold.fill_(math.log(0.03))
        coder.b_enc.fill_(5.0)
    x = 3 * torch.randn(1000, coder.n_layers, 8, generator=torch.Generator().manual_seed(0)) + 2
    init.encoder_bias_for_rate(coder, x, rate=rate)
    assert ((coder.encode(x) > 0).sum(dim=0) == round(1000 * rate)).all()


def test_the_rate_holds_for_relu_too(clt):
    x = torch.randn(200, 3, 8)
    with torch.no_grad():
        clt.log_threshold.fill_(-torch.inf)
    init.encoder_bias_for_rate(clt, x, rate=0.05)
    assert ((clt.encode(x) > 0).sum(dim=0) == 10).all()


@pytest.mark.parametrize("rate", [1e-5, 1.0])
def test_a_rate_that_the_tokens_cannot_show_is_refused(clt, rate):
    with pytest.raises(
        ConfigError, match=r"expected a firing rate between 1/100 and 1; found .*\n  where: train.init.l0"
    ):
        init.encoder_bias_for_rate(clt, torch.randn(100, 3, 8), rate=rate)


@pytest.mark.parametrize("row", ROWS)
def test_zero_decoders_write_nothing_and_begin_to_learn(row):
    coder = started(ROWS[row], n_layers=2, n_features=6, d_model=3).double()
    init.zero_decoder(coder)
    encoder = coder.W_enc.detach().clone()
    assert encoder.any()
    x, y = tokens_for(coder, 32), tokens_for(coder, 32, seed=2)
    with torch.no_grad():
        coder.log_threshold.fill_(-torch.inf)
        a = coder.encode(x)
        for source in range(coder.n_sources):
            assert a[:, source].any() and not coder.decode_layer(source, a[:, source], x[:, source]).any()
        assert not coder.decoder_norms().any()
    moved = set()
    for _ in range(4):
        coder.zero_grad()
        (coder(x) - y).square().sum(dim=(1, 2)).mean().backward()
        with torch.no_grad():
            for name, parameter in coder.named_parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all()
                if name != "log_threshold" and parameter.grad is not None and parameter.grad.any():
                    moved.add(name)
                    parameter -= 0.05 * parameter.grad
    assert moved == {name for name, _ in coder.named_parameters()} - {"log_threshold"}
    assert not torch.equal(coder.W_enc, encoder)


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("how", init.INITIALISERS)
def test_identical_models_start_the_same(models, shared, how):
    coder = started(ArchitectureConfig("crosscoder", models=models, shared=shared), how, n_layers=2, n_features=5)
    assert not torch.equal(coder.W_enc[:2], coder.W_enc[2:4])
    init.identical_models(coder)
    block = coder.decoder_block(0)
    for index in range(models):
        rows = slice(2 * index, 2 * index + 2)
        assert torch.equal(coder.W_enc[rows], coder.W_enc[:2])
        assert torch.equal(block[:, rows], block[:, :2])
    assert not torch.equal(block[:, 0], block[:, 1])
    x = torch.randn(7, 2, 8)
    y = coder(x.repeat(1, models, 1))
    for index in range(1, models):
        torch.testing.assert_close(y[:, 2 * index : 2 * index + 2], y[:, :2])


def test_one_model_is_identical_already():
    coder = random_transcoder(2, 3, 2, architecture=ROWS["crosscoder"])
    before = [parameter.clone() for parameter in coder.parameters()]
    init.identical_models(coder)
    assert all(torch.equal(one, other) for one, other in zip(before, coder.parameters(), strict=True))


def test_decoder_bias_is_the_mean(clt):
    mean = torch.randn(3, 8)
    init.decoder_bias_from_mean(clt, mean)
    assert torch.equal(clt.b_dec.detach(), mean)
