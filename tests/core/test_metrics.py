import itertools

import pytest
import torch

from circuitmill.core.metrics import (
    ExplainedVariance,
    Firing,
    agreement,
    cross_entropy,
    cross_entropy_recovered,
    kl_divergence,
    percentile_of_counts,
)


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    y = torch.randn(100, 3, 4) * torch.tensor([1.0, 10.0, 0.1])[:, None] + 5
    return y, y + 0.3 * torch.randn_like(y)


def test_explained_variance_is_the_definition(outputs):
    y, y_hat = (side.double() for side in outputs)
    ev = ExplainedVariance(3, 4)
    ev.update(*outputs)
    error = (y - y_hat).square().sum(dim=(0, 2))
    deviation = (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    torch.testing.assert_close(ev.per_layer(), 1 - error / deviation, rtol=1e-10, atol=1e-10)
    assert ev.pooled() == pytest.approx(float(1 - error.sum() / deviation.sum()), rel=1e-10)


@pytest.mark.parametrize("cuts", [(1, 50), (99,), (0, 33, 33, 66)])
def test_explained_variance_does_not_depend_on_the_split(outputs, cuts):
    y, y_hat = outputs
    whole, parts = ExplainedVariance(3, 4), ExplainedVariance(3, 4)
    whole.update(y, y_hat)
    edges = [0, *cuts, 100]
    for start, stop in itertools.pairwise(edges):
        other = ExplainedVariance(3, 4)
        other.update(y[start:stop], y_hat[start:stop])
        parts.merge(other)
    assert parts.n_tokens == 100
    torch.testing.assert_close(parts.per_layer(), whole.per_layer(), rtol=1e-12, atol=1e-12)


def test_explained_variance_can_be_negative_and_is_not_clamped():
    ev = ExplainedVariance(1, 1)
    ev.update(torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[[9.0]], [[9.0]]]))
    assert ev.pooled() < -100


def test_a_large_mean_does_not_spoil_the_deviation():
    torch.manual_seed(0)
    y = torch.randn(1000, 1, 2, dtype=torch.float64) + 1e4
    ev = ExplainedVariance(1, 2)
    for part in y.split(100):
        ev.update(part, part + 0.1)
    expected = 1 - 1000 * 2 * 0.01 / (y - y.mean(dim=0)).square().sum()
    assert ev.pooled() == pytest.approx(float(expected), rel=1e-6)


def test_firing_equals_counting(outputs):
    a = (outputs[0] - 5).relu()
    firing, merged = Firing(3, 4), Firing(3, 4)
    firing.update(a)
    for part in a.split(30):
        other = Firing(3, 4)
        other.update(part)
        merged.merge(other)
    counts = (a > 0).sum(dim=2)
    torch.testing.assert_close(firing.l0(), counts.double().mean(dim=0))
    torch.testing.assert_close(firing.density(), (a > 0).double().mean(dim=0))
    for share in (0.05, 0.5, 0.95):
        exact = counts.sort(dim=0).values[max(0, -int(-share * 100 // 1) - 1)]
        assert firing.l0_percentile(share).tolist() == exact.tolist()
        assert merged.l0_percentile(share).tolist() == exact.tolist()
    total = counts.sum(dim=1).sort().values
    assert firing.l0_total_percentile(0.5) == total[49].item()


def test_dead_means_never_above_zero():
    firing = Firing(1, 3)
    firing.update(torch.tensor([[[0.0, -1.0, 1e-9]]]))
    assert firing.dead().tolist() == [[True, True, False]]


def test_percentile_of_counts():
    histogram = torch.tensor([[0, 10, 0, 10]])
    assert [percentile_of_counts(histogram, share).item() for share in (0.1, 0.5, 0.51, 1.0)] == [1, 1, 3, 3]


def test_behaviour_of_two_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    by_hand = (p * (p / q).log()).sum()
    torch.testing.assert_close(kl_divergence(p.log() + 3, q.log())[0], by_hand)
    assert not agreement(p.log(), q.log())[0]
    torch.testing.assert_close(cross_entropy(p.log(), torch.tensor([1]))[0], -torch.tensor(0.25).log())
    assert cross_entropy_recovered(original=1.0, replaced=1.0, ablated=2.0) == 1.0
