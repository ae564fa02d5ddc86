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


@pytest.mark.parametrize("products", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["jumprelu", "relu", "topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax"])
def test_loss_and_gradients_equal_the_cpus(name, products):
    """With few places the GPU's kernels, one after the other, do what the CPU's operators do."""
    k = 0.0 if name in ("jumprelu", "relu") else 4.0
    cfg = tiny(products=products, nonlinearity__name=name, nonlinearity__k=k, n_features=32)
    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        clt = random_transcoder(3, 32, 8).to(device)
        x, y = (torch.randn(64, 3, 8, dtype=torch.float64).to(device) for _ in range(2))
        dead = (torch.arange(3 * 32) % 7 == 0).view(3, 32).to(device)
        result = evaluate_batch(clt, x, y, cfg, Moment(320, dead, torch.zeros(3, 32, device=device)))
        assert set(result.sparse) == {products == "sparse"}
        gradients = torch.autograd.grad(result.loss, list(clt.parameters()), allow_unused=True)
        used = [gradient for gradient in gradients if gradient is not None]
        results[device] = [result.loss, *result.terms.values(), *used]
    assert len(results["cpu"]) == len(results["cuda"])
    for here, there in zip(results["cpu"], results["cuda"], strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)
