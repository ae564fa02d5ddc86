"""One training step on a GPU gives the loss and the gradients of the CPU."""

import pytest
import torch
from tests.core.test_transcoder import random_transcoder
from tests.training.helpers import tiny

from circuitmill.training.objective import Moment, evaluate_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_loss_and_gradients_equal_the_cpus():
    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        clt = random_transcoder(3, 32, 8).to(device)
        x, y = (torch.randn(64, 3, 8, dtype=torch.float64).to(device) for _ in range(2))
        dead = (torch.arange(3 * 32) % 7 == 0).view(3, 32).to(device)
        result = evaluate_batch(clt, x, y, tiny(), Moment(320, dead, torch.zeros(3, 32, device=device)))
        gradients = torch.autograd.grad(result.loss, list(clt.parameters()))
        results[device] = [result.loss, *result.terms.values(), *gradients]
    for here, there in zip(results["cpu"], results["cuda"], strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)
