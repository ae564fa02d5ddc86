import torch

from circuitmill.core.hashing import mix, text_keys, uniform


def naive_equal(token_id: list[int], starts: list[bool], length: int, one: int, two: int) -> bool:
    def text(at: int) -> list[int]:
        first = max(at - length + 1, max(index for index in range(at + 1) if starts[index] or index == 0))
        return token_id[first : at + 1]

    return text(one) == text(two)


def test_keys_are_equal_exactly_where_the_text_is_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    token_id = torch.randint(0, 2, (90,), generator=generator)
    starts = torch.rand(90, generator=generator) < 0.2
    for length in (1, 3, 90):
        key = text_keys(token_id, starts, length)
        for one in range(90):
            for two in range(one):
                expected = naive_equal(token_id.tolist(), starts.tolist(), length, one, two)
                assert bool(key[one] == key[two]) == expected, (length, one, two)


def test_keys_do_not_depend_on_what_came_before_the_document() -> None:
    starts = torch.tensor([True, False, False])
    alone = text_keys(torch.tensor([7, 8, 9]), starts, 5)
    late = text_keys(
        torch.cat([torch.arange(3000), torch.tensor([7, 8, 9])]),
        torch.cat([torch.zeros(3000, dtype=torch.bool), starts]),
        5,
    )
    assert torch.equal(alone, late[3000:])


def test_mixing_is_one_to_one_and_the_same_everywhere() -> None:
    numbers = torch.arange(-5000, 5000)
    assert mix(numbers).unique().numel() == 10000
    # splitmix64's first output for seed 0 is the finaliser of its increment
    assert mix(torch.tensor([0x9E3779B97F4A7C15 - (1 << 64)]))[0].item() == 0xE220A8397B1DCDAF - (1 << 64)


def test_uniform_numbers_fill_the_interval_evenly_and_follow_the_seed() -> None:
    numbers = uniform(torch.arange(20000), seed=3)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert (counts - 2000).abs().max() < 200
    other = uniform(torch.arange(20000), seed=4)
    assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 0.03
