"""The Triton kernels on a GPU: the checks of the interpreter, larger shapes, and what an interpreter cannot show."""

import pytest
import torch
from tests.kernels.kernel_cases import (
    SHAPES,
    TF32,
    TYPES,
    check_above,
    check_above_limits,
    check_decode,
    check_dots,
    check_segments,
    random_like,
    random_places,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LARGE = (1500, 3000, 2304, 40)

shapes = pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
types = pytest.mark.parametrize(("one", "other"), [*TYPES, (F64, BF16)], ids=str)


@shapes
@types
def test_decode(shape, one, other):
    from circuitmill.kernels import fused

    check_decode(fused, shape, one, other, "cuda")
    check_decode(fused, shape, one, other, "cuda", repeated=True)


@shapes
@types
def test_dots(shape, one, other):
    from circuitmill.kernels import fused

    check_dots(fused, shape, one, other, "cuda")
    check_dots(fused, shape, one, other, "cuda", shuffled=True)


@shapes
@types
@pytest.mark.parametrize("piece", [16, 1024])
def test_segments(shape, one, other, piece, monkeypatch):
    """Feature 0 of the large shape has about 1,000 entries, 63 pieces of 16."""
    from circuitmill.kernels import fused

    monkeypatch.setattr(fused, "PIECE", piece)
    check_segments(fused, shape, one, one, other, "cuda")


@shapes
@pytest.mark.parametrize(("one", "other"), [*TYPES, (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_above(shape, one, other, precision, monkeypatch):
    from circuitmill.kernels import encode

    rounded = precision == "high" and torch.promote_types(one, other) == F32
    share = TF32 if rounded else None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        whole = check_above(encode, shape, one, other, "cuda", share=share)
        monkeypatch.setattr(encode, "PLACES", 300 * shape[1])
        in_parts = check_above(encode, shape, one, other, "cuda", share=share)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(here, there) for here, there in zip(whole, in_parts, strict=True))


def test_above_is_limited():
    from circuitmill.kernels import encode

    check_above_limits(encode, "cuda")


def test_above_holds_no_matrix():
    """8,192 tokens by 32,768 features are 1 GiB in float32; bits and counts of them 40 MiB."""
    from circuitmill.kernels import encode

    x, weight = (random_like((size, 64), BF16, size, "cuda") for size in (8192, 32768))
    zeros, none = torch.zeros(32768, device="cuda"), torch.full((8192,), -torch.inf, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    feature, offsets = encode.above(x, weight, zeros, zeros + 32.0, none, 10**7)
    assert 0 < len(feature) == offsets[-1] < 10**6
    assert torch.cuda.max_memory_allocated() - before < 80 * 2**20


def test_positions_beyond_32_bits():
    """The last rows of a table of more than 2^31 numbers."""
    from circuitmill.kernels import fused

    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    columns = 9216
    features = 2**31 // columns + 1000
    weight = torch.zeros(features, columns, dtype=BF16, device="cuda")
    weight[-3:] = random_like((3, columns), BF16, 0, "cuda")
    feature = torch.tensor([0, features - 3, features - 1, features - 2], device="cuda")
    token, offsets = torch.tensor([0, 0, 0, 1], device="cuda"), torch.tensor([0, 3, 4], device="cuda")
    values = random_like(4, F32, 1, "cuda")
    tail, last = weight[-3:].double(), values.double()[1:]
    found = fused.decode(values, feature, offsets, weight)
    exact = torch.stack([last[0] * tail[0] + last[1] * tail[2], last[2] * tail[1]])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    dots = fused.dots(found, weight, feature, token)
    exact = torch.stack(
        [found[0].double() @ row for row in (tail[0] * 0, tail[0], tail[2])] + [found[1].double() @ tail[1]]
    )
    torch.testing.assert_close(dots.double(), exact, rtol=1e-5, atol=1e-2)
    offsets = torch.zeros(features + 1, dtype=torch.int64, device="cuda")
    offsets[-1] = 2
    rows = fused.segments(values[:2], found, token[2:], offsets, BF16)
    exact = (values[:2, None].double() * found.double()).sum(dim=0)
    torch.testing.assert_close(rows[-1].double(), exact, rtol=2**-8, atol=1e-5)
    assert not rows[:-1].any()


def test_the_same_bits_every_time():
    """A feature that fires everywhere has its entries added up in pieces, and comparisons race for nothing."""
    from circuitmill.kernels import encode, fused

    feature, token, offsets = random_places(3000, 500, 60, device="cuda")
    values, rows = random_like(len(feature), F32, 1, "cuda"), random_like((3000, 700), F32, 2, "cuda")
    weight = random_like((500, 700), BF16, 3, "cuda")
    order = feature.argsort(stable=True)
    limits = torch.cat([offsets.new_zeros(1), torch.bincount(feature, minlength=500).cumsum(0)])
    zeros, none = torch.zeros(500, device="cuda"), torch.full((3000,), -torch.inf, device="cuda")

    def everything():
        return (
            fused.decode(values, feature, offsets, weight),
            fused.dots(rows, weight, feature, token),
            fused.segments(values[order], rows, token[order], limits, F32),
            *encode.above(rows, weight, zeros, zeros + 30.0, none, 10**7),
        )

    once = everything()
    for _ in range(5):
        assert all(torch.equal(here, there) for here, there in zip(once, everything(), strict=True))


class TestAdam:
    @pytest.mark.parametrize(
        ("rows", "columns", "block"),
        [(1, 1, 1), (13, 35, 7), (3, 2100, 1050), (5, 1100, 0), (9, 6, 1), (2048, 9216, 768), (2048, 9216, 0)],
    )
    def test_steps_equal_the_formula(self, rows, columns, block):
        from tests.kernels.adam_cases import check_adam

        check_adam((rows, columns), [F64] * 4, block, "cuda", bound=1e-11)
        check_adam((rows, columns), [F32] * 4, block, "cuda", bound=3e-6)
        check_adam((rows, columns), [F32, BF16, F32, F32], block, "cuda", bound=3e-6)

    @pytest.mark.parametrize("dtypes", [(BF16, BF16, F32, F32), (F32, F32, BF16, BF16), (BF16,) * 4], ids=str)
    def test_rounding(self, dtypes):
        from tests.kernels.adam_cases import check_rounding

        check_rounding(dtypes, "cuda")
        check_rounding(dtypes, "cuda", shape=(2048, 9216), block=768)

    def test_noise(self):
        from tests.kernels.adam_cases import check_noise

        check_noise("cuda")

    def test_what_is_not_finite(self):
        from tests.kernels.adam_cases import check_not_finite

        check_not_finite("cuda")
