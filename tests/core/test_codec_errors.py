"""How much each codec loses on numbers shaped like activations; the bounds are those of docs and README."""

from functools import cache

import numpy as np
import pytest
import torch
from tests.core.activation_data import EVERY_LOUD, EVERY_MASSIVE, KINDS, MASSIVE_CHANNEL, data
from torch import Tensor

from circuitmill.core.calibration import channel_constants, entropy_curve, step_for
from circuitmill.core.codecs import Channels, make_codec, standardised

GROUP, WIDTH, LAYERS = 32, 384, 2
LOSSY = ("int8", "int4", "int2", "entropy")


def calibrated(sample: Tensor, bits: float = 4.0) -> Channels:
    """What stage calibrate would give."""
    center, scale = channel_constants(sample)
    u = standardised(sample, Channels(center, scale, torch.ones(len(center))))
    return Channels(center, scale, step_for(bits, entropy_curve(u)))


@cache
def case(kind: str) -> tuple[Tensor, Channels]:
    """Activations, and constants from the first half of them."""
    x = data(kind, 2048, LAYERS, WIDTH)
    return x, calibrated(x[:1024])


def restored(name: str, x: Tensor, channels: Channels) -> Tensor:
    codec = make_codec(name, LAYERS, x.shape[2], GROUP)
    return codec.decode(codec.encode(x, channels), channels)


def nmse(found: Tensor, x: Tensor) -> Tensor:
    """Per layer."""
    return (found - x).double().square().sum(dim=(0, 2)) / x.double().square().sum(dim=(0, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "worst"), [("int8", 1e-4), ("int4", 8e-3), ("entropy", 7e-3), ("int2", 0.12)])
def test_relative_squared_error_is_bounded(name: str, worst: float, kind: str) -> None:
    x, channels = case(kind)
    error = nmse(restored(name, x, channels), x)
    assert (error <= worst).all() and (error > 0).all()


def entropy_of(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_costs_the_bits_that_were_asked_for(kind: str, bits: float) -> None:
    x, _ = case(kind)
    channels = calibrated(x[:1024], bits)
    codes = make_codec("entropy", LAYERS, WIDTH, GROUP).encode(x, channels)["codes"].numpy()
    for layer in range(LAYERS):
        assert entropy_of(codes[:, layer]) == pytest.approx(bits, abs=0.1)


def test_entropy_coding_is_within_a_tenth_of_what_theory_allows() -> None:
    """A uniform step costs a normal number pi e / 6 times the rate-distortion bound, 4^-bits (Gish and Pierce)."""
    x, channels = case("normal")
    bound = np.pi * np.e / 6 * 4.0**-4
    assert (nmse(restored("entropy", x, channels), x) < 1.1 * bound).all()


@pytest.mark.parametrize("name", LOSSY)
def test_a_massive_activation_costs_its_own_group_only(name: str) -> None:
    x = data("normal", 512, LAYERS, WIDTH)
    loud = x.clone()
    loud[::EVERY_MASSIVE, :, MASSIVE_CHANNEL] = 2000
    channels = calibrated(data("normal", 1024, LAYERS, WIDTH, seed=1))
    errors = [restored(name, values, channels) - values for values in (x, loud)]
    # the groups that do not hold it, and all groups of the tokens without it: bit for bit what they were
    assert torch.equal(errors[0][:, :, GROUP:], errors[1][:, :, GROUP:])
    spared = [token for token in range(512) if token % EVERY_MASSIVE]
    assert torch.equal(errors[0][spared], errors[1][spared])
    assert not torch.equal(errors[0], errors[1])


@pytest.mark.parametrize("name", LOSSY)
def test_massive_activations_in_the_sample_cost_others_nothing(name: str) -> None:
    """Less than a hundredth more squared error elsewhere, although the constants have seen them."""
    x = data("normal", 2048, LAYERS, WIDTH)
    loud = data("massive", 2048, LAYERS, WIDTH)
    errors = [(restored(name, v, calibrated(v[:1024])) - v)[:, :, GROUP:].square().sum().item() for v in (x, loud)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("name", LOSSY)
def test_a_loud_channel_costs_its_neighbours_nothing(name: str) -> None:
    """Less than a hundredth more squared error, in its own group too."""
    x = data("student 4", 2048, LAYERS, WIDTH)
    loud = data("student 4, loud channels", 2048, LAYERS, WIDTH)
    quiet = [channel for channel in range(WIDTH) if channel % EVERY_LOUD]
    assert torch.equal(x[:, :, quiet], loud[:, :, quiet])
    errors = [(restored(name, v, calibrated(v[:1024])) - v)[:, :, quiet].square().sum().item() for v in (x, loud)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("name", LOSSY)
def test_channels_far_from_zero_cost_nothing(name: str) -> None:
    x = data("normal", 1024, LAYERS, WIDTH)
    offset = torch.zeros(WIDTH)
    offset[::50] = 300.0
    errors = [(restored(name, v, calibrated(v)) - v).square().sum().item() for v in (x, x + offset)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_rotation_pays() -> None:
    """With four bits and one channel of every group loud in some tokens, what a plain grid would lose is larger."""
    x = data("student 3", 1024, LAYERS, WIDTH)
    channels = calibrated(x)
    ours = nmse(restored("int4", x, channels), x).mean()
    u = standardised(x, channels).unflatten(2, (-1, GROUP))
    scale = u.abs().amax(dim=3, keepdim=True) / 8
    plain = ((u / scale).floor().clamp(-8, 7) + 0.5) * scale
    assert ours < 0.75 * ((plain - u).square().sum() / u.square().sum())


@pytest.mark.parametrize("name", [*LOSSY, "bf16", "float32"])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_size_does_not_matter_once_calibrated(name: str, size: float) -> None:
    x = data("normal", 512, LAYERS, WIDTH)
    error, expected = (nmse(restored(name, v, calibrated(v)) / s, x) for v, s in ((x * size, size), (x, 1.0)))
    torch.testing.assert_close(error, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", LOSSY)
def test_constant_channels_and_equal_tokens_are_finite_and_close(name: str) -> None:
    x = data("normal", 512, LAYERS, WIDTH)
    x[:, :, ::7] = 3.0
    x[:, 1] = 5.0
    found = restored(name, x, calibrated(x))
    assert found.isfinite().all()
    worst = {"int8": 1e-4, "entropy": 7e-3, "int4": 8e-3, "int2": 0.12}[name]
    assert (nmse(found, x) <= worst).all()
    assert (found[:, 1] - 5.0).abs().max() < 1e-2
