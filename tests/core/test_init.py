import math

import pytest
import torch

from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError


@pytest.fixture
def clt():
    made = Transcoder(n_layers=3, n_features=50, d_model=8)
    init.uniform(made, generator=torch.Generator().manual_seed(0))
    return made


def test_bounds_of_the_recipe(clt):
    assert clt.W_enc.abs().max().item() == pytest.approx(1 / math.sqrt(50), rel=0.01)
    for block in clt.W_dec:
        assert block.abs().max().item() == pytest.approx(1 / math.sqrt(3 * 8), rel=0.02)
    assert not clt.b_enc.any() and not clt.b_dec.any()


def test_the_seed_decides(clt):
    other = Transcoder(n_layers=3, n_features=50, d_model=8)
    init.uniform(other, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clt.W_enc, other.W_enc)
    init.uniform(other, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(clt.W_enc, other.W_enc)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_every_feature_fires_at_the_rate(clt, rate):
    x = torch.randn(1000, 3, 8) + 2
    init.encoder_bias_for_rate(clt, x, rate=rate)
    firing = (clt.encode(x) > 0).double().mean(dim=0)
    assert (firing - rate).abs().max() <= 0.002


@pytest.mark.parametrize("rate", [1e-5, 1.0])
def test_a_rate_that_the_tokens_cannot_show_is_refused(clt, rate):
    with pytest.raises(
        ConfigError, match=r"expected a firing rate between 1/100 and 1; found .*\n  where: train.init.l0"
    ):
        init.encoder_bias_for_rate(clt, torch.randn(100, 3, 8), rate=rate)


def test_decoder_bias_is_the_mean(clt):
    mean = torch.randn(3, 8)
    init.decoder_bias_from_mean(clt, mean)
    assert torch.equal(clt.b_dec.detach(), mean)
