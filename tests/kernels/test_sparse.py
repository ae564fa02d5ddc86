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
    entries = sparse.places_above(pre, log_threshold.exp() - bandwidth / 2)
    a = jumprelu(entries.gather(pre), log_threshold[entries.feature], bandwidth)
    kept = sparse.decode_entries(entries, a, block)
    dense_a = jumprelu(pre, log_threshold, bandwidth)
    dense = torch.einsum("nf,ftd->ntd", dense_a, block)
    torch.testing.assert_close(kept, dense, rtol=0, atol=1e-12)
    assert sparse.fired(entries, a.detach()).tolist() == (dense_a > 0).any(dim=0).tolist()
    for one, other in zip(
        torch.autograd.grad(kept, (pre, block, log_threshold), upstream),
        torch.autograd.grad(dense, (pre, block, log_threshold), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_tokens_without_entries_get_zeros():
    pre = torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
    entries = sparse.places_above(pre, torch.ones(2))
    assert entries.offsets.tolist() == [0, 0, 2]
    written = sparse.decode_entries(entries, entries.gather(pre), torch.ones(2, 1, 1))
    assert written.flatten().tolist() == [0.0, 5.0, 0.0]
