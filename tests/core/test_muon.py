import pytest
import torch

from circuitmill.core.muon import Muon, orthogonalised


def moved(start: torch.Tensor, gradients: list[torch.Tensor], **options) -> torch.Tensor:
    weight = torch.nn.Parameter(start.clone())
    group = {"params": [weight]} | ({"stack": options.pop("stack")} if "stack" in options else {})
    optimizer = Muon([group], **({"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9} | options))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_matrices_of_a_stack_are_worked_on_by_themselves(axis):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 6, 7, generator=generator) for _ in range(4))
    found = moved(start, gradients, stack=axis)
    for index in range(start.shape[axis]):
        alone = moved(start.select(axis, index), [gradient.select(axis, index) for gradient in gradients])
        # the same numbers; products of transposed views may be summed in another order
        torch.testing.assert_close(found.select(axis, index), alone, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_with_adams_rate_numbers_move_as_far_as_adam_moves_them(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    step = moved(torch.zeros(shape), [gradient], match_adam=True, weight_decay=0.0, lr=1.0)
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    own = moved(torch.zeros(shape), [gradient], weight_decay=0.0, lr=1.0)
    rows, columns = shape
    torch.testing.assert_close(own, step / (0.2 * max(shape) ** 0.5) * max(1, rows / columns) ** 0.5)
    torch.testing.assert_close(own, -orthogonalised(gradient) * max(1, rows / columns) ** 0.5, rtol=0.1, atol=0.02)


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
