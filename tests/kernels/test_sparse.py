import pytest
import torch

from circuitmill.core.nonlinearity import jumprelu
from circuitmill.kernels import sparse


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_values_and_gradients_equal_the_dense_product(share):
    torch.manual_seed(0)
    pre = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    block = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    log_threshold = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    floor = torch.quantile(pre.detach(), 1 - share, dim=0) if share < 1 else torch.full((5,), -9.0).double()
    bandwidth = 0.5
    with torch.no_grad():
        log_threshold.copy_((floor + bandwidth / 2).clamp_min(1e-3).log())
    upstream = torch.randn(7, 3, 2, dtype=torch.float64)
    entries = sparse.places(pre.detach() > log_threshold.detach().exp() - bandwidth / 2)
    a = jumprelu(entries.gather(pre), log_threshold[entries.feature], bandwidth)
    operand = sparse.Sparse(entries, a)
    kept = operand.times(block.flatten(1)).view(7, 3, 2)
    dense_a = jumprelu(pre, log_threshold, bandwidth)
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
