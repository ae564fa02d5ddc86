import torch

from circuitmill.core.lengths import lengths, root


def test_value_and_derivative_are_those_of_the_norm():
    torch.manual_seed(0)
    rows = torch.randn(7, 5, dtype=torch.float64)
    rows[3] = 0
    rows.requires_grad_()
    torch.testing.assert_close(lengths(rows), rows.norm(dim=1))
    upstream = torch.randn(7, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(one, rows, upstream)[0] for one in (lengths(rows), rows.norm(dim=1)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert not ours[3].any()
    assert torch.autograd.gradcheck(lambda own: lengths(own), rows[:3].detach().requires_grad_())


def test_root_of_zero_has_no_derivative():
    square = torch.tensor([0.0, 4.0], requires_grad=True)
    found = root(square)
    assert found.tolist() == [0.0, 2.0]
    assert torch.autograd.grad(found.sum(), square)[0].tolist() == [0.0, 0.25]
