import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core import codec_reference as reference
from tests.core.activation_data import KINDS, data

from circuitmill.core.codecs import (
    CODECS,
    Channels,
    Codec,
    Encoded,
    StoredBatch,
    hadamard,
    make_codec,
    plain_batch,
    scale_codes,
    scale_values,
    standardised,
)
from circuitmill.errors import ConfigError

LOSSY = ("int8", "int4", "int2", "entropy")
GROUP_ARRAY = {"int8": "scales", "int4": "scales", "int2": "scales", "entropy": "shifts"}
LAYERS = 2


def channels_for(width: int, seed: int = 0, layers: int = LAYERS) -> Channels:
    """Constants that differ between channels and layers."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(layers, width, generator=generator)
    scale = torch.exp(torch.randn(layers, width, generator=generator))
    return Channels(center, scale, torch.linspace(0.2, 0.5, layers))


def constants(channels: Channels) -> tuple[np.ndarray, ...]:
    return tuple(value.numpy().astype(np.float64) for value in (channels.center, channels.scale, channels.step))


def samples(width: int, kind: str, n_tokens: int = 24) -> tuple[torch.Tensor, Channels]:
    channels = channels_for(width)
    return data(kind, n_tokens, LAYERS, width) * channels.scale + channels.center, channels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "group"), [(96, 32), (96, 24), (64, 64), (80, 16)])
@pytest.mark.parametrize("name", LOSSY)
def test_every_stored_number_is_that_of_the_definition(name: str, width: int, group: int, kind: str) -> None:
    x, channels = samples(width, kind)
    codec = make_codec(name, LAYERS, width, group)
    stored = codec.encode(x, channels)
    expected = reference.encode(name, x.numpy(), *constants(channels), group)
    codes = reference.unpacked(name, stored["codes"].numpy())
    groups = stored[GROUP_ARRAY[name]].numpy()
    assert expected.sure_groups.mean() > 0.95 and expected.sure_codes.mean() > 0.9
    assert np.array_equal(groups[expected.sure_groups], expected.groups[expected.sure_groups])
    assert np.array_equal(codes[expected.sure_codes], expected.codes[expected.sure_codes])
    if name == "entropy" and kind == "massive":
        assert (groups > 0).any()


@pytest.mark.parametrize(("width", "group"), [(96, 32), (96, 24), (64, 64)])
@pytest.mark.parametrize("name", LOSSY)
def test_every_restored_number_is_that_of_the_definition(name: str, width: int, group: int) -> None:
    """Of codes that are any bytes, so that every level and every scale comes up."""
    rng = np.random.default_rng(1)
    channels = channels_for(width)
    codec = make_codec(name, LAYERS, width, group)
    stored = {
        key: torch.from_numpy(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (9, *shape)).astype(dtype))
        for key, (dtype, shape) in codec.arrays().items()
    }
    if name == "entropy":
        stored["shifts"] = stored["shifts"] % 20
    codes = reference.unpacked(name, stored["codes"].numpy())
    expected = reference.decode(name, codes, stored[GROUP_ARRAY[name]].numpy(), *constants(channels), group)
    found = codec.decode(stored, channels).numpy()
    # errors are relative to the largest number of a block, which the rotation mixes
    size = np.abs(expected).reshape(9, LAYERS, -1, group).max(axis=3).repeat(group, axis=2)
    assert (np.abs(found - expected) <= 2e-6 * size + 1e-6).all()


@pytest.mark.parametrize("size", [1, 2, 8, 32, 128])
def test_hadamard_is_the_orthonormal_matrix(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"))
    np.testing.assert_allclose(matrix.numpy(), reference.hadamard(size), atol=1e-7)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))


def test_scales_are_the_least_that_hold_the_largest_number() -> None:
    largest = torch.exp2(torch.linspace(-11, 19, 5000)) * 127
    codes = scale_codes(largest, 127.0)
    values = scale_values(codes).double()
    assert (largest <= 127 * values * (1 + 1e-6)).all()
    assert (largest > 127 * scale_values(codes - 1).double() * (1 - 1e-6)).all()
    assert scale_codes(torch.tensor([0.0, 1e-30, 1e30]), 127.0).tolist() == [0, 0, 255]
    assert scale_values(torch.tensor([96, 104, 88], dtype=torch.uint8)).tolist() == [1.0, 2.0, 0.5]


def test_bf16_is_exact_for_every_finite_pattern_of_bits() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[torch.isfinite(bits)].reshape(-1, 2, 8)
    assert finite.numel() == 2**16 - 2**8
    codec, neutral = make_codec("bf16", 2, 8, 32), Channels.neutral(2, 8)
    for x in (finite, finite.float()):
        stored = codec.encode(x, neutral)
        assert stored["values"].dtype == torch.uint16
        assert torch.equal(stored["values"].view(torch.int16), finite.view(torch.int16))
        restored = codec.decode(stored, neutral)
        assert torch.equal(restored.view(torch.int32), finite.float().view(torch.int32))


def test_float32_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (500, 2, 8), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.where(torch.isfinite(bits), bits, -torch.zeros(()))
    codec, neutral = make_codec("float32", 2, 8, 32), Channels.neutral(2, 8)
    restored = codec.decode(codec.encode(x, neutral), neutral)
    assert torch.equal(restored.view(torch.int32), x.view(torch.int32))
    assert codec.encode(x.to(torch.bfloat16), neutral)["values"].dtype == torch.float32


@pytest.mark.parametrize("name", CODECS)
def test_blocks_do_not_change_the_result(name: str) -> None:
    width = 2**15
    codec = make_codec(name, LAYERS, width, 32)
    assert codec.block_rows == 4
    x, channels = samples(width, "student 3", 11)
    original = x.clone()
    whole = codec.encode(x, channels)
    assert torch.equal(x, original), "what is given is not overwritten"
    one = codec.encode_block(x, channels)
    restored = codec.decode(whole, channels)
    for key, (dtype, shape) in codec.arrays().items():
        assert torch.equal(whole[key], one[key])
        assert (str(whole[key].dtype), tuple(whole[key].shape)) == (f"torch.{dtype}", (11, *shape))
    for row in range(11):
        alone = codec.encode(x[row : row + 1], channels)
        assert all(torch.equal(alone[key][0], whole[key][row]) for key in whole)
        assert torch.equal(codec.decode(alone, channels)[0], restored[row])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_errors_are_at_most_half_a_step(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(["int8", "entropy"]))
    group = draw.draw(st.sampled_from([1, 3, 8, 20]))
    width = group * draw.draw(st.integers(1, 4))
    size = 2.0 ** draw.draw(st.integers(-8, 12))
    seed = draw.draw(st.integers(0, 2**16))
    kind = draw.draw(st.sampled_from(KINDS[:3]))
    channels = channels_for(width, seed)
    x = data(kind, 5, LAYERS, width, seed) * size * channels.scale + channels.center
    codec = make_codec(name, LAYERS, width, group)
    stored = codec.encode(x, channels)
    if name == "int8":
        steps = scale_values(stored["scales"]).double()
    else:
        steps = channels.step[:, None].double() * 2.0 ** stored["shifts"].double()
    half = 0.5 * steps.repeat_interleave(group, dim=2) * channels.scale
    error = (codec.decode(stored, channels).double() - x.double()).abs()
    assert (error <= half * (1 + 1e-4) + 1e-6 * (x.abs() + channels.center.abs())).all()
    assert stored["codes"].abs().max() <= 127


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_levels_are_no_further_than_the_widest_scale_puts_them(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(["int4", "int2"]))
    group = draw.draw(st.sampled_from([4, 8, 12, 32]))
    width = group * draw.draw(st.sampled_from([1, 2, 4]))
    seed = draw.draw(st.integers(0, 2**16))
    channels = Channels.neutral(LAYERS, width)
    x = data("student 3", 5, LAYERS, width, seed)
    codec = make_codec(name, LAYERS, width, group)
    error = (codec.decode(codec.encode(x, channels), channels) - x).double().unflatten(2, (-1, group))
    rotated = torch.from_numpy(reference.rotated(x.double().numpy(), group)).unflatten(2, (-1, group))
    # a step is the largest number over half of the levels, 9% more at most; half of that is the largest error
    widest = rotated.abs().amax(dim=3) / {"int4": 8, "int2": 2}[name] * 2 ** (1 / 8)
    assert (error.square().sum(dim=3) <= group * (widest / 2).square() * (1 + 1e-4)).all()


NUMBERS = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1.0, -3.5, 2000.0, 1e-12]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.lists(st.sampled_from(NUMBERS), min_size=16, max_size=16),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
)
def test_any_finite_number_is_restored_as_a_finite_one(name: str, numbers: list[float], scale: float) -> None:
    x = torch.tensor(numbers).reshape(1, 1, 16)
    if scale < 1:
        # a channel that small in the calibration stays within 10^35 of it
        x = x.clamp(-1e5 * scale, 1e5 * scale)
    channels = Channels(torch.zeros(1, 16), torch.full((1, 16), scale), torch.tensor([0.25]))
    codec = make_codec(name, 1, 16, 8)
    restored = codec.decode(codec.encode(x, channels), channels)
    assert restored.isfinite().all()
    if name in ("int8", "entropy"):
        # signs survive where anything does
        assert (restored * x >= 0).all()


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_and_equal_tokens(name: str) -> None:
    codec = make_codec(name, LAYERS, 32, 16)
    neutral = Channels.neutral(LAYERS, 32)
    restored = codec.decode(codec.encode(torch.zeros(3, LAYERS, 32), neutral), neutral)
    # the levels of int4 and int2 lie beside zero, by half of the least step
    assert restored.abs().max() <= (0 if name in ("int8", "entropy") else 4 * 2.0**-13 * 2)
    token = data("normal", 1, LAYERS, 32)
    equal = codec.decode(codec.encode(token.expand(9, -1, -1), neutral), neutral)
    # a matrix product may add up in another order at the end of a block
    torch.testing.assert_close(equal, equal[:1].expand_as(equal), rtol=1e-5, atol=1e-6)


def test_int8_beyond_the_largest_scale_is_cut_not_wrapped() -> None:
    codec, neutral = make_codec("int8", 1, 8, 8), Channels.neutral(1, 8)
    x = torch.tensor([1e30, -1e30, 1e9, 1.0, 0.0, -1e10, 3e38, -3e38]).reshape(1, 1, 8)
    stored = codec.encode(x, neutral)
    assert stored["scales"].tolist() == [[[255]]]
    assert stored["codes"].flatten().tolist() == [127, -127, 127, 0, 0, -127, 127, -127]


@pytest.mark.parametrize("name", CODECS)
def test_what_is_encoded_decodes_itself_anywhere(name: str) -> None:
    x, channels = samples(64, "normal")
    codec = make_codec(name, LAYERS, 64, 16)
    encoded = Encoded(codec, channels, codec.encode(x, channels))
    moved = encoded.to(torch.device("cpu"))
    assert len(moved) == len(encoded) == len(x)
    assert torch.equal(moved.decode(), codec.decode(encoded.arrays, channels))
    bits = 8 * sum(value.nbytes for value in encoded.arrays.values()) / x.numel()
    assert bits == {"float32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5, "int2": 2.5, "entropy": 8.5}[name]


def test_a_plain_batch_holds_what_it_is_given() -> None:
    x, y = torch.randn(7, 2, 5), torch.randn(7, 2, 5)
    batch = plain_batch(x, y)
    assert isinstance(batch, StoredBatch)
    assert torch.equal(batch.inputs.decode(), x) and torch.equal(batch.outputs.decode(), y)
    # a copy: the trainer may change what it gets
    assert batch.inputs.decode().data_ptr() != x.data_ptr()


def test_no_tokens_at_all_are_no_activations() -> None:
    for name in CODECS:
        codec, channels = make_codec(name, LAYERS, 32, 16), Channels.neutral(LAYERS, 32)
        assert codec.decode(codec.encode(torch.empty(0, LAYERS, 32), channels), channels).shape == (0, LAYERS, 32)


def test_groups_must_divide_the_channels() -> None:
    assert make_codec("int8", 2, 16, 64) == Codec("int8", 2, 16, 16)
    assert make_codec("bf16", 2, 17, 5).group_channels == 0
    for name in LOSSY:
        with pytest.raises(ConfigError, match=r"a divisor of d_model \(96\); found 64(.|\n)*cache\.group_channels"):
            make_codec(name, 2, 96, 64)


@pytest.mark.parametrize(("name", "width", "multiple"), [("int4", 15, 2), ("int2", 18, 4)])
def test_codes_must_fill_their_bytes(name: str, width: int, multiple: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"multiple of {multiple} for codec {name}; found {width}(.|\n)*cache\.codec"
    ):
        make_codec(name, 2, width, 3)
    assert make_codec("int8", 2, width, 3).group_channels == 3


def test_attributes_say_what_a_reader_must_know() -> None:
    assert make_codec("int4", 2, 96, 24).attributes() == {
        "codec": "int4",
        "group_channels": 24,
        "levels": 16,
        "rotation": 8,
    }
    assert make_codec("entropy", 2, 96, 24).attributes() == {"codec": "entropy", "group_channels": 24}
    assert make_codec("bf16", 2, 96, 24).attributes() == {"codec": "bf16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_standardised_form_goes_where_it_is_asked_to(dtype: torch.dtype) -> None:
    x, channels = samples(96, "normal")
    x = x.to(dtype)
    out = torch.full((len(x), LAYERS, 96), float("nan"))
    assert standardised(x, channels, out).data_ptr() == out.data_ptr()
    new = standardised(x.movedim(1, 0).contiguous().movedim(0, 1), channels)
    assert torch.equal(out, (x.float() - channels.center) * (1 / channels.scale))
    assert torch.equal(new, out) and new.is_contiguous() and new.dtype == torch.float32
