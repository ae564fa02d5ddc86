import pytest
import torch
from tests.core import reference
from tests.core.test_transcoder import random_transcoder

from circuitmill.core import losses


@pytest.fixture
def clt():
    return random_transcoder(2, 3, 2)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, 2, 2, dtype=torch.float64)


def same_with_gradients(ours, theirs, parameters):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    for one, other in zip(
        torch.autograd.grad(ours, parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(theirs, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def without_thresholds(clt):
    return [parameter for name, parameter in clt.named_parameters() if name != "log_threshold"]


def test_reconstruction_equals_the_loop(clt, x):
    y = torch.randn(4, 2, 2, dtype=torch.float64)
    _, a = reference.encode(clt, x)
    theirs = reference.reconstruction(y, reference.decode(clt, a))
    same_with_gradients(losses.reconstruction(y, clt(x)), theirs, without_thresholds(clt))


def test_tanh_sparsity_equals_the_loop(clt, x):
    _, a = reference.encode(clt, x)
    ours = losses.tanh_sparsity(clt.encode(x), clt.decoder_norms(), 1.7)
    same_with_gradients(ours, reference.tanh_sparsity(clt, a, 1.7), without_thresholds(clt))


def test_pre_activation_equals_the_loop_for_thresholds_too(clt, x):
    pre, _ = reference.encode(clt, x)
    ours = losses.pre_activation(clt.pre_activations(x), clt.threshold, clt.decoder_norms())
    same_with_gradients(ours, reference.pre_activation(clt, pre), list(clt.parameters()))


def test_auxiliary_sends_no_gradient_to_the_error():
    error = torch.randn(3, 2, 2, requires_grad=True)
    error_hat = torch.randn(3, 2, 2, requires_grad=True)
    loss = losses.auxiliary(error, error_hat)
    loss.backward()
    assert error.grad is None
    torch.testing.assert_close(error_hat.grad, 2 * (error_hat - error).detach() / 3)


def test_strongest_keeps_k_and_passes_their_gradient_only():
    pre = torch.tensor([[5.0, 1.0, 3.0, -2.0], [-1.0, -2.0, -3.0, 4.0]], requires_grad=True)
    kept = losses.strongest(pre, 2)
    assert kept.tolist() == [[5.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0]]
    kept.sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert losses.strongest(pre[:, :1], 2).shape == (2, 1)


@pytest.mark.parametrize("parts", [2, 4])
def test_means_over_equal_parts_are_the_whole(parts):
    torch.manual_seed(0)
    pre, norms, threshold = (
        torch.randn(8, 2, 3, dtype=torch.float64),
        torch.rand(2, 3).double(),
        torch.rand(2, 3).double(),
    )
    y, y_hat = torch.randn(8, 2, 5, dtype=torch.float64), torch.randn(8, 2, 5, dtype=torch.float64)
    terms = {
        "reconstruction": lambda rows: losses.reconstruction(y[rows], y_hat[rows]),
        "sparsity": lambda rows: losses.tanh_sparsity(pre[rows].relu(), norms, 4.0),
        "pre_activation": lambda rows: losses.pre_activation(pre[rows], threshold, norms),
        "auxiliary": lambda rows: losses.auxiliary(y[rows], y_hat[rows]),
    }
    size = 8 // parts
    for name, term in terms.items():
        split = sum(term(slice(k * size, (k + 1) * size)) for k in range(parts)) / parts
        torch.testing.assert_close(split, term(slice(None)), rtol=1e-12, atol=0, msg=name)
