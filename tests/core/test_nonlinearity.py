import math

import pytest
import torch
from tests.core import reference

from circuitmill.core.nonlinearity import jumprelu


@pytest.mark.parametrize("derivative", ["chain", "direct"])
@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_gradients_equal_the_stated_formula(derivative, bandwidth):
    torch.manual_seed(0)
    pre = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    log_threshold = (torch.randn(4, dtype=torch.float64) * 0.3 - 0.5).requires_grad_()
    upstream = torch.randn(50, 4, dtype=torch.float64)
    ours = torch.autograd.grad(jumprelu(pre, log_threshold, bandwidth, derivative), (pre, log_threshold), upstream)
    theirs = reference.jumprelu_gradients(pre.detach(), log_threshold.detach(), upstream, bandwidth, derivative)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("derivative", "factor"), [("chain", 1.0), ("direct", math.exp(0.3))])
def test_threshold_gradient_estimates_the_slope_of_the_expectation(derivative, factor):
    # h uniform on [0, 3]: d/dt E[a] = -theta * theta * density, exactly, for t = log(theta)
    n_tokens = 200_001
    pre = torch.linspace(0, 3, n_tokens, dtype=torch.float64)[:, None]
    log_threshold = torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)
    mean = jumprelu(pre, log_threshold, 0.2, derivative).mean()
    (gradient,) = torch.autograd.grad(mean, log_threshold)
    step = 1e-2
    up, down = (jumprelu(pre, log_threshold.detach() + sign * step).mean() for sign in (1, -1))
    assert gradient.item() == pytest.approx(factor * (up - down).item() / (2 * step), rel=2e-3)


def test_all_layers_at_once_and_chosen_entries_give_the_same():
    torch.manual_seed(0)
    pre, log_threshold = torch.randn(6, 2, 3), torch.randn(2, 3)
    whole = jumprelu(pre, log_threshold)
    torch.testing.assert_close(jumprelu(pre[:, 1], log_threshold[1]), whole[:, 1])
    entries = jumprelu(pre.flatten(), log_threshold.expand(6, 2, 3).flatten())
    torch.testing.assert_close(entries.view(6, 2, 3), whole)
