import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitmill.core.calibration import channel_constants, entropy_curve, step_for, step_grid

LAYERS, WIDTH = 2, 24


def normal(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed))


def nearest_quantile(values: np.ndarray, share: float) -> float:
    """The value of the rank nearest to that share of the way."""
    return sorted(values.tolist())[round(share * (len(values) - 1))]


def test_center_and_scale_are_quantiles() -> None:
    x = normal(1001) * torch.linspace(0.5, 2, WIDTH) + 3
    center, scale = channel_constants(x)
    for layer in range(LAYERS):
        for channel in range(WIDTH):
            values = x[:, layer, channel].numpy()
            low, middle, high = (nearest_quantile(values, share) for share in (0.1587, 0.5, 0.8413))
            assert center[layer, channel].item() == pytest.approx(middle, rel=1e-6)
            assert scale[layer, channel].item() == pytest.approx((high - low) / 2, rel=1e-5)
            ours = np.quantile(values.astype(np.float64), [0.1587, 0.5, 0.8413], method="nearest")
            assert center[layer, channel].item() == pytest.approx(ours[1], rel=1e-6)
            assert scale[layer, channel].item() == pytest.approx((ours[2] - ours[0]) / 2, rel=1e-5)


def test_of_normal_channels_they_are_mean_and_deviation() -> None:
    deviation = torch.linspace(0.5, 1.9, WIDTH)
    center, scale = channel_constants(normal(20_000) * deviation - 7)
    torch.testing.assert_close(center, torch.full_like(center, -7.0), rtol=0, atol=0.06)
    torch.testing.assert_close(scale, deviation.expand_as(scale), rtol=0.03, atol=0)


def test_massive_tokens_are_not_seen() -> None:
    x = normal(4000)
    massive = x.clone()
    massive[::100] = 2000.0
    before, after = channel_constants(x), channel_constants(massive)
    # one token in a hundred moves a quantile by a hundredth of the way
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(two, one, rtol=0.06, atol=0.06)
    assert massive.std() > 100


def test_quiet_channels_get_a_quarter_of_the_layers_median() -> None:
    x = normal(4000)
    x[:, 0, 3] *= 1e-3
    x[:, 0, 4] = 0.5
    x[:, 0, 5] *= 0.3
    center, scale = channel_constants(x)
    median = np.median([nearest_quantile(x[:, 0, c].numpy(), 0.8413) for c in range(6, WIDTH)])
    assert scale[0, 3] == scale[0, 4] == pytest.approx(0.25 * median, rel=0.05)
    assert center[0, 4] == 0.5
    assert scale[0, 5] == pytest.approx(0.3, rel=0.05), "above the floor it keeps its own"
    assert scale[1].min() > 0.9, "layers do not share the floor"


def test_a_layer_that_never_varies_has_scale_one() -> None:
    x = normal(100)
    x[:, 1] = 4.0
    center, scale = channel_constants(x)
    assert (center[1] == 4).all() and (scale[1] == 1).all() and (scale[0] != 1).all()


def test_a_layer_in_which_few_channels_vary_has_their_deviation() -> None:
    x = torch.zeros(100, 1, WIDTH)
    x[::50, 0, 2] = 10.0
    _, scale = channel_constants(x)
    assert (scale > 0).all()
    assert scale[0, 7].item() == pytest.approx(x[:, 0, 2].double().std(correction=0).item())


def test_bfloat16_samples_count_as_float32() -> None:
    x = normal(300).to(torch.bfloat16)
    for one, two in zip(channel_constants(x), channel_constants(x.float()), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)


def entropy(codes: np.ndarray) -> float:
    """-sum p log2 p, by counting."""
    total, result = len(codes), 0.0
    for value in set(codes.tolist()):
        share = float((codes == value).sum()) / total
        result -= share * math.log2(share)
    return result


def test_the_curve_is_shannons_entropy_of_the_codes() -> None:
    u = normal(150)
    curve = entropy_curve(u)
    assert curve.shape == (LAYERS, len(step_grid()))
    for layer in range(LAYERS):
        for index, step in enumerate(step_grid().tolist()):
            codes = np.round((u[:, layer].numpy() / np.float32(step)).astype(np.float64)).astype(int).flatten()
            # float32 and float64 round a number in a thousand apart at most
            assert curve[layer, index].item() == pytest.approx(entropy(codes), abs=2e-3)


def test_the_grid_goes_from_eight_deviations_down_to_a_64th() -> None:
    grid = step_grid().tolist()
    assert (grid[0], grid[-1]) == (8.0, 1 / 64)
    ratios = {round(math.log2(a / b), 5) for a, b in itertools.pairwise(grid)}
    assert ratios == {0.25}


def test_a_finer_step_costs_one_bit_an_octave() -> None:
    curve = entropy_curve(torch.randn(4000, 1, 64, generator=torch.Generator().manual_seed(0)))
    exact = 0.5 * math.log2(2 * math.pi * math.e) - step_grid().log2()
    fine = step_grid() < 0.7
    torch.testing.assert_close(curve[0, fine], exact[fine], rtol=0, atol=0.03)
    assert curve[0, 0] < 0.01, "a step of eight deviations leaves nothing"


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0, 5.3, 7.0])
def test_the_step_for_some_bits_costs_those_bits(bits: float) -> None:
    u = normal(20_000) * torch.tensor([1.0, 3.0])[:, None]
    steps = step_for(bits, entropy_curve(u))
    for layer in range(LAYERS):
        codes = np.round(u[:, layer].numpy() / float(steps[layer])).astype(int).flatten()
        assert entropy(codes) == pytest.approx(bits, abs=0.02)
    assert steps[1] / steps[0] == pytest.approx(3, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 35), st.floats(0, 1), st.integers(0, 1000))
def test_between_points_of_the_grid_it_is_linear_in_the_octave(index: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = np.cumsum(rng.uniform(0.05, 0.4, len(step_grid()))).astype(np.float32)
    wanted = float(bits[index] + share * (bits[index + 1] - bits[index]))
    found = step_for(wanted, torch.from_numpy(bits)[None])
    exponent = 3 - (index + share) / 4
    assert math.log2(found.item()) == pytest.approx(exponent, abs=1e-3)


def test_beyond_the_curve_the_nearest_end_is_taken() -> None:
    curve = torch.linspace(1, 5, len(step_grid()))[None]
    assert step_for(0.5, curve).item() == 8.0
    assert step_for(6.0, curve).item() == 1 / 64
    flat = torch.full((1, len(step_grid())), 2.0)
    assert step_for(3.0, flat).item() == 1 / 64


def test_a_dip_in_a_noisy_curve_does_no_harm() -> None:
    curve = torch.linspace(0, 8, len(step_grid()))[None].clone()
    curve[0, 10] = curve[0, 8] - 0.3
    steps = [step_for(bits, curve).item() for bits in np.linspace(0.2, 7.8, 60).tolist()]
    assert steps == sorted(steps, reverse=True)


def test_a_layer_without_variation_costs_nothing() -> None:
    curve = entropy_curve(torch.zeros(50, 1, 8))
    assert (curve == 0).all()
    assert math.isfinite(step_for(4.0, curve).item())
