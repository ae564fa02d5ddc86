from pathlib import Path

import pytest
import torch

from circuitmill.core.codecs import Channels, standardised
from circuitmill.errors import DivergedError, StoreError
from circuitmill.stores.normalization import (
    MomentSums,
    load_moments,
    load_normalization,
    merge_moments,
    moments_of,
    save_moments,
)


def _x(n_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.tensor([0.5, 20.0]).reshape(1, 2, 1) * torch.randn(n_tokens, 2, 8, generator=generator)


def _definition(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations from it, token by token in float64."""
    mean, m2 = torch.zeros(x.shape[1:], dtype=torch.float64), torch.zeros(x.shape[1:], dtype=torch.float64)
    for token in x.double():
        mean += token / len(x)
    for token in x.double():
        m2 += (token - mean).square()
    return mean, m2


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e3])
def test_moments_against_the_definition(offset: float) -> None:
    x = _x(1000) + offset
    moments = moments_of(x, "input")
    mean, m2 = _definition(x)
    assert moments.count == 1000
    assert ((moments.mean - mean).abs() <= 1e-6 * ((m2 / 1000).sqrt() + mean.abs())).all()
    torch.testing.assert_close(moments.m2, m2, rtol=1e-6 * (1 + offset), atol=0)
    torch.testing.assert_close(moments.sum_squares, x.double().square().sum(dim=(0, 2)), rtol=1e-6, atol=0)


def test_moments_of_many_blocks_equal_the_definition() -> None:
    """More tokens than are summed in float32 at a time, in a model of the usual width."""
    x = 5 + torch.randn(700, 2, 768, generator=torch.Generator().manual_seed(2))
    moments = moments_of(x, "input")
    mean, m2 = _definition(x)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.m2, m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory", ["new", "given"])
@pytest.mark.parametrize("block", [1, 37, 1000])
def test_moments_from_the_standardised_form_are_those_of_the_numbers(block: int, memory: str) -> None:
    x = _x(1000)
    # constants of a sample: near the mean and the deviation, not on them
    channels = Channels(x[:50].mean(dim=0), x[:50].std(dim=0), torch.ones(2))
    sums = MomentSums(channels)
    for part in x.split(block):
        u = standardised(part, channels)
        before = u.clone()
        sums.add(u, torch.full_like(u, float("nan")) if memory == "given" else None)
        assert torch.equal(u, before)
    moments = sums.moments("input")
    mean, m2 = _definition(x)
    assert moments.count == 1000
    assert ((moments.mean - mean).abs() <= 1e-6 * ((m2 / 1000).sqrt() + mean.abs())).all()
    torch.testing.assert_close(moments.m2, m2, rtol=2e-6, atol=0)


def test_a_channel_that_never_varies_has_no_negative_moment() -> None:
    x = _x(300)
    x[:, 0, 1] = 7.25
    channels = Channels(x[:50].mean(dim=0) + 0.1, x[:50].std(dim=0) + 0.3, torch.ones(2))
    sums = MomentSums(channels)
    sums.add(standardised(x, channels))
    moments = sums.moments("input")
    assert (moments.m2 >= 0).all() and moments.m2[0, 1] < 1e-3
    assert moments.mean[0, 1].item() == pytest.approx(7.25, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_among_the_standardised_names_the_layer(bad: float) -> None:
    sums = MomentSums(Channels.neutral(2, 8))
    x = _x(10)
    x[3, 0, 2] = bad
    sums.add(_x(10))
    sums.add(x)
    with pytest.raises(DivergedError, match=r"finite MLP inputs(.|\n)*layer 0 of the model"):
        sums.moments("input")


def test_merging_parts_equals_the_whole() -> None:
    x = _x(1000)
    parts = [(moments_of(part, "input"), moments_of(2 * part, "output")) for part in x.split([1, 399, 600])]
    inputs, outputs = merge_moments(parts)
    whole = moments_of(x, "input")
    assert inputs.count == 1000
    torch.testing.assert_close(inputs.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.m2, whole.m2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.m2, 4 * whole.m2, rtol=1e-5, atol=1e-6)


def test_scales_bring_the_mean_square_to_the_width(tmp_path: Path) -> None:
    x, y = _x(500), _x(500, seed=1) * 7
    save_moments(tmp_path / "n.safetensors", moments_of(x, "input"), moments_of(y, "output"), scales=True)
    normalization = load_normalization(tmp_path / "n.safetensors")
    for scale, values in ((normalization.input_scale, x), (normalization.output_scale, y)):
        scaled = (values * scale.reshape(1, 2, 1)).square().sum(dim=2).mean(dim=0)
        torch.testing.assert_close(scaled, torch.full((2,), 8.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(normalization.output_mean, y.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_moments_round_trip(tmp_path: Path) -> None:
    moments = moments_of(_x(100), "input")
    save_moments(tmp_path / "m.safetensors", moments, moments_of(_x(100), "output"))
    inputs, _ = load_moments(tmp_path / "m.safetensors")
    assert inputs.count == 100
    assert torch.equal(inputs.m2, moments.m2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_names_the_layer(bad: float) -> None:
    x = _x(10)
    x[3, 1, 2] = bad
    with pytest.raises(DivergedError, match=r"finite MLP outputs(.|\n)*layer 1 of the model"):
        moments_of(x, "output")


def test_all_zero_layer_has_no_scale(tmp_path: Path) -> None:
    x = _x(10)
    x[:, 0] = 0
    moments = moments_of(x, "input")
    with pytest.raises(DivergedError, match=r"not all zero(.|\n)*layer 0"):
        save_moments(tmp_path / "n.safetensors", moments, moments, scales=True)


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"\x10")
    with pytest.raises(StoreError, match=r"a whole safetensors file(.|\n)*m\.safetensors"):
        load_moments(tmp_path / "m.safetensors")
