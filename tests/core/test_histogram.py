import pytest
import torch

from circuitmill.core.histogram import GrowingHistogram


def values_of_three_features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    value = torch.cat([torch.rand(500, generator=generator) * scale + 1e-4 for scale in (0.01, 1.0, 700.0)])
    feature = torch.arange(3).repeat_interleave(500)
    order = torch.randperm(1500, generator=generator)
    return feature[order], value[order]


def test_counts_do_not_depend_on_order_or_batches() -> None:
    feature, value = values_of_three_features()
    whole = GrowingHistogram(3, 64)
    whole.update(feature, value)
    parts = GrowingHistogram(3, 64)
    for chunk in range(1499, -1, -37):
        parts.update(feature[max(chunk - 36, 0) : chunk + 1], value[max(chunk - 36, 0) : chunk + 1])
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.exponent, parts.exponent)


def test_each_value_is_in_its_bin() -> None:
    feature, value = values_of_three_features()
    histogram = GrowingHistogram(3, 64)
    histogram.update(feature, value)
    for which in range(3):
        mine = value[feature == which].double()
        limit = float(histogram.limit()[which])
        assert limit / 2 <= float(mine.max()) < limit
        expected = torch.histc(mine, bins=64, min=0, max=limit).long()
        assert torch.equal(histogram.counts[which], expected)


def test_quantiles_are_exact_to_a_bin() -> None:
    feature, value = values_of_three_features()
    histogram = GrowingHistogram(3, 512)
    histogram.update(feature, value)
    shares = torch.arange(1, 100, dtype=torch.float64) / 100
    found = histogram.quantiles(shares)
    for which in range(3):
        mine = value[feature == which].double()
        width = float(histogram.limit()[which]) / 512
        assert ((mine[:, None] < found[which] - width).double().mean(0) <= shares).all()
        assert ((mine[:, None] <= found[which] + width).double().mean(0) >= shares).all()


def test_bars_add_up_and_end_above_the_largest_value() -> None:
    feature, value = values_of_three_features()
    histogram = GrowingHistogram(4, 512)
    histogram.update(feature, value)
    for which in range(3):
        counts, edges = histogram.bars(which, n_bars=40)
        mine = value[feature == which]
        assert len(edges) == len(counts) + 1 <= 41
        assert sum(counts) == 500
        assert edges[0] == 0 and edges[-2] <= float(mine.max()) < edges[-1]
        assert counts[0] == int((mine < edges[1]).sum())
    assert histogram.bars(3, n_bars=40) == ([], [])


@pytest.mark.parametrize("largest", [1.0, 4.0, 2.0**-9])
def test_a_power_of_two_fits(largest: float) -> None:
    histogram = GrowingHistogram(1, 4)
    histogram.update(torch.tensor([0]), torch.tensor([largest]))
    assert histogram.counts[0].tolist() == [0, 0, 1, 0]
    assert float(histogram.quantiles(torch.tensor([1.0]))[0, 0]) == largest
