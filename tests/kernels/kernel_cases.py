"""Inputs and comparisons of the Triton kernels, for the interpreter (`interpreted_*.py`) and for a GPU."""

import functools

import torch

from circuitmill.kernels import reference

SHAPES = {
    # tokens, features, columns, entries per token at most
    "one of everything": (1, 1, 1, 1),
    "one token": (1, 40, 70, 9),
    "one entry per token": (23, 37, 65, 1),
    "blocks that do not fit": (13, 70, 531, 9),
    "features seldom": (5, 150, 16, 3),
    "no entries": (5, 30, 33, 0),
}


def random_places(tokens: int, features: int, most: int, seed: int = 0, device: str = "cpu"):
    """Feature, token and offsets of random entries.

    Some rows are empty and, where there are entries, one row has every feature; feature 0 is in most rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for token in range(tokens):
        count = int(torch.randint(0, most + 1, (), generator=generator))
        row = torch.randperm(features, generator=generator)[:count]
        if token == 2 and most:
            row = torch.arange(features)
        elif count and token % 3:
            row = torch.cat([row, torch.zeros(1, dtype=torch.int64)])
        rows.append(row.unique())
    counts = torch.tensor([len(row) for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    token = torch.arange(tokens).repeat_interleave(counts)
    return torch.cat(rows).to(device), token.to(device), offsets.to(device)


def by_feature(feature, token, features: int):
    """The order by feature, tokens in that order, and offsets."""
    order = feature.argsort(stable=True)
    counts = torch.bincount(feature, minlength=features)
    return order, token[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def random_like(shape, dtype, seed: int, device: str):
    """Normal numbers of a type, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(device)


def assert_within(found, exact, size, share: float):
    """Every number differs from the exact one by at most a share of the sum of the sizes of its terms."""
    excess = (found.double() - exact).abs() - share * size
    assert found.shape == exact.shape
    assert (excess <= 0).all(), f"{excess.max():.3g} more than allowed, of {size.max():.3g}"


# Float32: a sum of n terms in any order is off by less than n 2^-24 times the sum of the terms' sizes (Higham 2002,
# section 4.2), and so much less on average that 2^-20 holds for every n here. Tables in bfloat16 are read exactly.
SHARES = {torch.float64: 1e-12, torch.float32: 2.0**-20}
TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]


def check_decode(fused, shape, values_dtype, weight_dtype, device="cpu", repeated=False):
    tokens, features, columns, most = shape
    feature, _, offsets = random_places(tokens, features, most, device=device)
    if repeated:
        feature = feature // 2
    values = random_like(len(feature), values_dtype, 1, device)
    weight = random_like((features, columns), weight_dtype, 2, device)
    found = fused.decode(values, feature, offsets, weight)
    exact = functools.partial(reference.decode, feature=feature, offsets=offsets)
    assert found.dtype == values_dtype
    assert_within(
        found,
        exact(values.double(), weight=weight.double()),
        exact(values.double().abs(), weight=weight.double().abs()),
        SHARES[values_dtype],
    )


def check_dots(fused, shape, rows_dtype, weight_dtype, device="cpu", shuffled=False):
    tokens, features, columns, most = shape
    feature, token, _ = random_places(tokens, features, most, device=device)
    if shuffled:
        order = torch.randperm(len(feature), generator=torch.Generator().manual_seed(0)).to(device)
        feature, token = feature[order], token[order]
    rows = random_like((tokens, columns), rows_dtype, 1, device)
    weight = random_like((features, columns), weight_dtype, 2, device)
    found = fused.dots(rows, weight, feature, token)
    assert found.dtype == rows_dtype
    exact = functools.partial(reference.dots, feature=feature, token=token)
    assert_within(
        found,
        exact(rows.double(), weight.double()),
        exact(rows.double().abs(), weight.double().abs()),
        SHARES[rows_dtype],
    )


def rounding(dtype, device: str) -> float:
    """Share of a sum by which writing it may change it: a bfloat16 has 8 bits, which the interpreter cuts off."""
    if dtype != torch.bfloat16:
        return 0.0
    return 2.0**-8 if device == "cuda" else 2.0**-7


def check_segments(fused, shape, values_dtype, rows_dtype, dtype, device="cpu"):
    tokens, features, columns, most = shape
    feature, token, _ = random_places(tokens, features, most, device=device)
    order, token, offsets = by_feature(feature, token, features)
    values = random_like(len(feature), values_dtype, 1, device)[order]
    rows = random_like((tokens, columns), rows_dtype, 2, device)
    found = fused.segments(values, rows, token, offsets, dtype)
    assert found.dtype == dtype
    exact = reference.segments(values.double(), rows.double(), token, offsets, torch.float64)
    size = reference.segments(values.double().abs(), rows.double().abs(), token, offsets, torch.float64)
    assert_within(found, exact, size, SHARES[values_dtype] + rounding(dtype, device))
    assert torch.equal(found, fused.segments(values, rows, token, offsets, dtype))


# Products of two bfloat16 or float16 numbers are exact in float32. TF32 may cut factors off after 11 bits, by 2^-10 of
# their size; the sum of two such numbers leaves 2^-20, and as much is lost with the product of the smaller ones.
PRODUCTS = {torch.float64: 1e-12, torch.float32: 2.0**-18, torch.bfloat16: 2.0**-20, torch.float16: 2.0**-20}
TF32 = 2.1 * 2.0**-10


def check_above(encode, shape, x_dtype, weight_dtype, device="cpu", share=None):
    """Places well above the floors are found, those well below are not, and rows list them in order."""
    tokens, features, columns, most = shape
    x = random_like((tokens, columns), x_dtype, 1, device)
    weight = random_like((features, columns), weight_dtype, 2, device)
    finer = torch.promote_types(x_dtype, weight_dtype)
    sums = torch.float64 if finer == torch.float64 else torch.float32
    bias, floor = (random_like(features, sums, seed, device) for seed in (3, 4))
    row_floor = random_like(tokens, sums, 5, device)
    row_floor[::2] = -torch.inf
    if features > 5:
        floor[3], floor[4] = torch.inf, -torch.inf
    row_floor[2:3] = torch.inf
    if most == 0:
        floor[:] = torch.inf
    pre = x.double() @ weight.double().T + bias.double()
    share = share or PRODUCTS[finer]
    if device == "cuda" and sums == torch.float32:
        # matrix units add eight products or more at a time and may cut each sum off after 24 bits
        share += columns / 8 * 2.0**-23
    room = share * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    highest = torch.maximum(floor.double(), row_floor.double()[:, None])
    feature, offsets = encode.above(x, weight, bias, floor, row_floor, tokens * features)
    assert feature.dtype == offsets.dtype == torch.int64
    assert offsets[0] == 0 and offsets[-1] == len(feature)
    token = torch.arange(tokens, device=device).repeat_interleave(offsets.diff())
    flat = token * features + feature
    assert (flat.diff() > 0).all() and ((feature >= 0) & (feature < features)).all()
    found = torch.zeros(tokens * features, dtype=torch.bool, device=device).index_fill(0, flat, True).view_as(pre)
    assert found[pre > highest + room].all()
    assert not found[pre < highest - room].any()
    return feature, offsets


def check_above_limits(encode, device="cpu"):
    """More places than asked for are counted, not listed; none lost at the limit."""
    x, weight = (random_like((9, 20), torch.float32, seed, device) for seed in (1, 2))
    zeros = torch.zeros(9, device=device)
    lists = [encode.above(x, weight, zeros, zeros, zeros, most) for most in (81, 0)]
    number = len(lists[0][0])
    assert 10 < number < 70
    lists += [encode.above(x, weight, zeros, zeros, zeros, most) for most in (number, number - 1)]
    assert [len(feature) for feature, _ in lists] == [number, 0, number, 0]
    assert all(torch.equal(offsets, lists[0][1]) for _, offsets in lists)
    assert torch.equal(lists[0][0], lists[2][0])
