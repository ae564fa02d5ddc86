import pytest
import torch
from torch import Tensor

from circuitmill.errors import ConfigError
from circuitmill.stores.quantize import channel_scales, make_codec

LAYERS, WIDTH = 2, 96


def _activations(kind: str, n_tokens: int = 4096) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, LAYERS, WIDTH, generator=generator)
    if kind == "gaussian":
        return x
    # Student's t with 4 degrees of freedom: a normal over the root of a chi-square
    chi = torch.randn(4, n_tokens, LAYERS, WIDTH, generator=generator).square().sum(dim=0) / 4
    heavy = x / chi.sqrt()
    if kind == "outlier channels":
        heavy[:, :, ::31] *= 50
    return heavy


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "outlier channels"])
def test_int8_error(kind: str) -> None:
    x = _activations(kind)
    codec = make_codec("int8", LAYERS, WIDTH, 32)
    channel = channel_scales(x[:1024])
    restored = codec.decode(codec.encode(x, channel), channel)
    error = (restored - x).square().sum(dim=(0, 2)) / x.square().sum(dim=(0, 2))
    assert (error < 1e-4).all()


def test_quiet_channels_survive_loud_neighbours() -> None:
    x = _activations("outlier channels")
    codec = make_codec("int8", LAYERS, WIDTH, 32)
    channel = channel_scales(x)
    restored = codec.decode(codec.encode(x, channel), channel)
    quiet = [index for index in range(WIDTH) if index % 31]
    error = (restored - x)[:, :, quiet].square().sum() / x[:, :, quiet].square().sum()
    assert error < 2e-4


def test_int8_is_within_half_a_step() -> None:
    x = _activations("heavy tails", 64)
    codec = make_codec("int8", LAYERS, WIDTH, 32)
    channel = channel_scales(x)
    stored = codec.encode(x, channel)
    step = stored["scales"].float().repeat_interleave(32, dim=2) * channel
    # the scale itself is rounded to float16, which costs the largest code up to 127 x 2^-11 steps more
    assert ((codec.decode(stored, channel) - x).abs() <= 0.57 * step + 1e-9).all()
    assert stored["codes"].abs().max() == 127


def test_zeros_and_tiny_values_stay_finite() -> None:
    x = torch.zeros(3, LAYERS, WIDTH)
    x[1] = 1e-12
    codec = make_codec("int8", LAYERS, WIDTH, 32)
    restored = codec.decode(codec.encode(x, torch.ones(LAYERS, WIDTH)), torch.ones(LAYERS, WIDTH))
    assert (restored == 0).all()
    assert (channel_scales(torch.zeros(3, LAYERS, WIDTH)) == 1).all()


def test_blocks_do_not_change_the_result() -> None:
    codec = make_codec("int8", 1, 2**17, 2**17)
    assert codec.block_rows == 2
    x = torch.randn(5, 1, 2**17, generator=torch.Generator().manual_seed(1))
    channel = torch.ones(1, 2**17)
    whole = codec.encode(x, channel)
    for row in range(5):
        for name, value in codec.encode(x[row : row + 1], channel).items():
            assert torch.equal(whole[name][row], value[0])


def test_bf16_is_bit_exact() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[torch.isfinite(bits)].reshape(-1, 1, 8)
    codec = make_codec("bf16", 1, 8, 32)
    stored = codec.encode(finite, None)
    assert stored["values"].dtype == torch.uint16
    restored = codec.decode(stored, None).to(torch.bfloat16)
    assert torch.equal(restored.view(torch.int16), finite.view(torch.int16))


def test_float32_is_bit_exact() -> None:
    x = _activations("heavy tails", 16)
    codec = make_codec("float32", LAYERS, WIDTH, 32)
    assert torch.equal(codec.decode(codec.encode(x, None), None), x)


def test_groups_must_divide_the_channels() -> None:
    assert make_codec("int8", 2, 16, 64).group_channels == 16
    with pytest.raises(ConfigError, match=r"a divisor of d_model \(96\); found 64(.|\n)*cache\.group_channels"):
        make_codec("int8", 2, 96, 64)
