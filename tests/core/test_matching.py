import torch

from circuitmill.core import matching
from circuitmill.core.matching import mutual_matches


def reference(left: torch.Tensor, right: torch.Tensor, wanted: list[int], least: float) -> dict[int, int]:
    cosine = [[float(a @ b / (a.norm() * b.norm())) for b in right.double()] for a in left.double()]
    found = {}
    for i in wanted:
        j = max(range(len(right)), key=lambda j: cosine[i][j])
        if max(range(len(left)), key=lambda k: cosine[k][j]) == i and cosine[i][j] > least:
            found[i] = j
    return found


def test_matches_are_those_of_the_loops(monkeypatch) -> None:
    monkeypatch.setattr(matching, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40, 6, generator=generator)
    # copies of most of them, disturbed more and more and scaled, in another order, and some of their own
    order = torch.randperm(30, generator=generator)
    noise = torch.linspace(0, 2, 30).unsqueeze(1) * torch.randn(30, 6, generator=generator)
    right = torch.cat([(left[:30] + noise)[order] * 3, torch.randn(5, 6, generator=generator)])
    wanted = [*range(0, 40, 2), 1, 3]
    found = mutual_matches(left, right, wanted)
    assert found == reference(left, right, wanted, matching.COSINE)
    assert 5 < len(found) < len(wanted)
    assert len(set(found.values())) == len(found)


def test_a_permuted_dictionary_is_found_whole_whatever_its_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    left, order = torch.randn(300, 32, generator=generator), torch.randperm(300, generator=generator)
    found = mutual_matches(left, left[order] * torch.rand(300, 1, generator=generator).add(0.1), list(range(300)))
    assert found == {int(feature): place for place, feature in enumerate(order)}


def test_the_nearest_of_two_copies_takes_the_match_and_opposites_have_none() -> None:
    right = torch.eye(3)
    left = torch.tensor([[1.0, 0.3, 0.0], [1.0, 0.1, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert mutual_matches(left, right, [0, 1, 2, 3]) == {1: 0}
    assert mutual_matches(left, right, [0]) == {}
    assert mutual_matches(left, right, []) == {}
