import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core import reference

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError


def random_transcoder(n_layers: int, n_features: int, d_model: int, seed: int = 0) -> Transcoder:
    torch.manual_seed(seed)
    clt = Transcoder(n_layers, n_features, d_model).double()
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_()
        clt.log_threshold.mul_(0.3).sub_(1)
    return clt


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_equals_the_double_loop(n_layers, n_features, d_model, n_tokens):
    clt = random_transcoder(n_layers, n_features, d_model)
    x = torch.randn(n_tokens, n_layers, d_model, dtype=torch.float64)
    pre, a = reference.encode(clt, x)
    torch.testing.assert_close(clt.pre_activations(x), pre, rtol=0, atol=1e-8)
    torch.testing.assert_close(clt.encode(x), a, rtol=0, atol=1e-8)
    torch.testing.assert_close(clt.decode(a), reference.decode(clt, a), rtol=0, atol=1e-8)
    torch.testing.assert_close(clt(x), reference.decode(clt, a), rtol=0, atol=1e-8)


def test_gradients_of_decoder_and_encoder_equal_the_double_loop():
    clt = random_transcoder(3, 4, 2)
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    parameters = [parameter for name, parameter in clt.named_parameters() if name != "log_threshold"]
    ours = torch.autograd.grad(clt(x).square().sum(), parameters)
    _, a = reference.encode(clt, x)
    theirs = torch.autograd.grad(reference.decode(clt, a).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_one_layer_and_a_block_of_features_are_parts_of_the_whole():
    clt = random_transcoder(2, 6, 3)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    whole = clt.encode(x)
    for layer in range(2):
        torch.testing.assert_close(clt.encode_layer(layer, x[:, layer]), whole[:, layer])
        torch.testing.assert_close(clt.encode_layer(layer, x[:, layer], slice(2, 5)), whole[:, layer, 2:5])


def test_norm_is_of_the_concatenated_decoder():
    clt = random_transcoder(2, 1, 2)
    with torch.no_grad():
        clt.W_dec[0].copy_(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    assert clt.decoder_norms()[0, 0].item() == pytest.approx(5.0)


def test_the_threshold_itself_does_not_fire():
    clt = Transcoder(1, 1, 1)
    x = torch.tensor([[[1.0]], [[1.0001]]])
    with torch.no_grad():
        clt.W_enc.fill_(1.0)
    assert clt.encode(x).flatten().tolist() == [0.0, pytest.approx(1.0001)]


def test_a_size_of_zero_is_refused():
    with pytest.raises(ShapeError, match=r"expected a size of at least 1; found 0\n  where: n_features"):
        Transcoder(2, 0, 3)
