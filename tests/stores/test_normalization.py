from pathlib import Path

import pytest
import torch

from circuitmill.errors import DivergedError, StoreError
from circuitmill.stores.normalization import (
    load_moments,
    load_normalization,
    merge_moments,
    moments_of,
    save_moments,
)


def _x(n_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.tensor([0.5, 20.0]).reshape(1, 2, 1) * torch.randn(n_tokens, 2, 8, generator=generator)


def test_moments_against_the_definition() -> None:
    x = _x(1000)
    moments = moments_of(x, "input")
    wide = x.double()
    torch.testing.assert_close(moments.mean, wide.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.m2, wide.var(dim=0, correction=0) * 1000, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.sum_squares, wide.square().sum(dim=(0, 2)), rtol=1e-5, atol=0)


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
