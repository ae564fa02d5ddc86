import pytest
import torch

from circuitmill.core.nonlinearity import jumprelu
from circuitmill.kernels import sparse


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("pass_through", [False, True])
@pytest.mark.parametrize("bandwidth", [0.5, 2.0])
def test_values_and_gradients_equal_the_dense_product(share, pass_through, bandwidth):
    torch.manual_seed(0)
    pre = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    block = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    log_threshold = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    floor = torch.quantile(pre.detach(), 1 - share, dim=0) if share < 1 else torch.full((5,), -9.0).double()
    with torch.no_grad():
        log_threshold.copy_((floor + bandwidth / 2).clamp_min(1e-3).log())
    upstream = torch.randn(7, 3, 2, dtype=torch.float64)
    entries = sparse.places(pre.detach() > log_threshold.detach().exp() - bandwidth / 2)
    assert (len(entries.flat) == 0) == (share == 0)
    a = jumprelu(entries.gather(pre), log_threshold[entries.feature], bandwidth, "chain", pass_through)
    operand = sparse.Sparse(entries, a)
    kept = operand.times(block.flatten(1)).view(7, 3, 2)
    dense_a = jumprelu(pre, log_threshold, bandwidth, "chain", pass_through)
    dense = torch.einsum("nf,ftd->ntd", dense_a, block)
    torch.testing.assert_close(kept, dense, rtol=0, atol=1e-12)
    assert operand.firings().tolist() == (dense_a > 0).sum(dim=0).tolist()
    torch.testing.assert_close(operand.dense(), dense_a, rtol=0, atol=0)
    for one, other in zip(
        torch.autograd.grad(kept, (pre, block, log_threshold), upstream),
        torch.autograd.grad(dense, (pre, block, log_threshold), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_tokens_without_entries_get_zeros():
    pre = torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
    entries = sparse.places(pre > 1)
    assert entries.offsets.tolist() == [0, 0, 2]
    written = sparse.Sparse(entries, entries.gather(pre)).times(torch.ones(2, 1))
    assert written.flatten().tolist() == [0.0, 5.0, 0.0]


def test_places_are_numbered_row_by_row():
    entries = sparse.places(torch.tensor([[False, True, True], [False, False, False], [True, False, False]]))
    assert entries.flat.tolist() == [1, 2, 6]
    assert entries.feature.tolist() == [1, 2, 0]
    assert entries.offsets.tolist() == [0, 2, 2]
    assert (entries.n_tokens, entries.n_features) == (3, 3)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_strongest_are_the_largest_positive_ones_among_the_allowed(k):
    torch.manual_seed(1)
    pre = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([True, False, True, True, False, True])
    expected = torch.zeros(8, 6, dtype=torch.float64)
    for token in range(8):
        places = sorted((i for i in range(6) if allowed[i] and pre[token, i] > 0), key=lambda i: -pre[token, i])
        for i in places[:k]:
            expected[token, i] = pre[token, i]
    kept = sparse.strongest(pre, k, allowed)
    torch.testing.assert_close(kept.dense(), expected, rtol=0, atol=0)
    assert kept.firings().tolist() == (expected > 0).sum(dim=0).tolist()
    weight = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(kept.times(weight), expected @ weight, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(kept.times(weight).sum(), pre)
    torch.testing.assert_close(gradient, (expected > 0) * weight.sum(dim=1), rtol=0, atol=1e-12)


def test_strongest_of_none_are_none():
    kept = sparse.strongest(torch.ones(3, 4), 2, torch.zeros(4, dtype=torch.bool))
    assert not kept.dense().any() and kept.times(torch.ones(4, 2)).shape == (3, 2)
