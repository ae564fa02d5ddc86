import pytest
import torch
from tests.core import reference
from tests.core.test_transcoder import random_transcoder
from tests.training.helpers import tiny

from circuitmill.kernels import sparse
from circuitmill.training import objective


@pytest.fixture
def clt():
    return random_transcoder(2, 4, 3)


@pytest.fixture
def pair():
    torch.manual_seed(3)
    return torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)


NONE_DEAD = torch.zeros(2, 4, dtype=torch.bool)


def gradients(clt, loss):
    return torch.autograd.grad(loss, list(clt.parameters()))


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_terms_equal_the_double_loop(clt, pair, way, monkeypatch):
    monkeypatch.setattr(sparse, "WORTHWHILE", {"sparse": 1.0, "dense": -1.0}[way])
    cfg = tiny(loss__sparsity_scale=1.3)
    result = objective.evaluate_batch(clt, *pair, cfg, sparsity=0.7, dead=NONE_DEAD)
    pre, a = reference.encode(clt, pair[0])
    expected = {
        "reconstruction": reference.reconstruction(pair[1], reference.decode(clt, a)),
        "sparsity": reference.tanh_sparsity(clt, a, 1.3),
        "pre_activation": reference.pre_activation(clt, pre),
    }
    for name, value in expected.items():
        assert result.terms[name].item() == pytest.approx(value.item(), abs=1e-8)
    total = expected["reconstruction"] + 0.7 * expected["sparsity"] + 1e-3 * expected["pre_activation"]
    assert result.loss.item() == pytest.approx(total.item(), abs=1e-8)
    assert result.fired.tolist() == (a > 0).any(dim=0).tolist()
    assert result.l0.tolist() == pytest.approx((a > 0).double().sum(dim=2).mean(dim=0).tolist())


def test_sparse_and_dense_way_have_the_same_gradients(clt, pair, monkeypatch):
    found = []
    for limit in (1.0, -1.0):
        monkeypatch.setattr(sparse, "WORTHWHILE", limit)
        result = objective.evaluate_batch(clt, *pair, tiny(), sparsity=0.7, dead=NONE_DEAD)
        found.append(gradients(clt, result.loss))
    for one, other in zip(*found, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", [5])
def test_gradient_of_a_batch_is_the_mean_over_its_parts(clt, pair, parts):
    dead = torch.tensor([[True, False, False, True], [False, False, True, False]])

    def of(rows):
        part = [side[rows] for side in pair]
        return gradients(clt, objective.evaluate_batch(clt, *part, tiny(), sparsity=0.7, dead=dead).loss)

    whole = of(slice(None))
    split = [of(slice(k, k + 1)) for k in range(parts)]
    for index, gradient in enumerate(whole):
        torch.testing.assert_close(sum(part[index] for part in split) / parts, gradient, rtol=1e-6, atol=1e-10)


def test_auxiliary_term_asks_dead_features_for_the_error(clt, pair):
    dead = torch.tensor([[True, True, False, False], [False, True, True, False]])
    x, error = pair
    pre, _ = reference.encode(clt, x)
    kept = torch.where(dead, pre.relu(), 0.0)
    kept[:, 0] = torch.where(kept[:, 0] == kept[:, 0].max(dim=1, keepdim=True).values, kept[:, 0], 0.0)
    kept[:, 1] = torch.where(kept[:, 1] == kept[:, 1].max(dim=1, keepdim=True).values, kept[:, 1], 0.0)
    error_hat = reference.decode(clt, kept) - clt.b_dec
    ours = objective.auxiliary_term(clt, list(pre.unbind(dim=1)), error, dead, k=1)
    torch.testing.assert_close(ours, (error - error_hat).square().sum() / 5, rtol=0, atol=1e-8)
    few = objective.auxiliary_term(clt, list(pre.unbind(dim=1)), error, dead, k=4)
    with_all = reference.decode(clt, torch.where(dead, pre.relu(), 0.0)) - clt.b_dec
    torch.testing.assert_close(few, 4 / 8 * (error - with_all).square().sum() / 5, rtol=0, atol=1e-8)


def test_auxiliary_gradient_reaches_dead_features_only(clt, pair):
    dead = torch.zeros(2, 4, dtype=torch.bool)
    dead[1, 2] = True
    pres = list(clt.pre_activations(pair[0]).unbind(dim=1))
    loss = objective.auxiliary_term(clt, pres, pair[1], dead, k=4)
    (gradient,) = torch.autograd.grad(loss, clt.W_enc)
    assert gradient[1, 2].abs().sum() > 0
    gradient[1, 2] = 0
    assert not gradient.any()
