import pytest
import torch

from circuitmill.toyworld.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_directions_stay_and_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ found @ v.T
    assert (rotated - rotated.diagonal().diag_embed()).abs().max() < 0.02


def test_steps_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((32, 8), (8, 32), (16, 16))]
    ours = [torch.nn.Parameter(weight.clone()) for weight in start]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in start]
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = (Muon(ours, **options), torch.optim.Muon(theirs, **options))
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.005 * moved
        assert (mine - before).norm() > 0.5 * moved


def test_a_matrix_without_gradient_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=0.1, weight_decay=0.1, momentum=0.9).step()
    assert torch.equal(weight, torch.ones(3, 3))
