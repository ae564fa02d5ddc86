import torch
from tests.core.test_transcoder import random_transcoder

from circuitmill.core.scaling import Scaling, fold


def test_folded_on_raw_equals_unfolded_on_normalised():
    clt = random_transcoder(3, 6, 4).float()
    scaling = Scaling.by_layer(torch.tensor([0.5, 3.0, 1.0]), torch.tensor([2.0, 0.1, 7.0]), 4)
    raw = torch.randn(9, 3, 4) * torch.tensor([4.0, 0.2, 1.0])[:, None]
    folded = fold(clt, scaling)
    with torch.no_grad():
        torch.testing.assert_close(folded.encode(raw), clt.encode(scaling.inputs(raw)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scaling.outputs(folded(raw)), clt(scaling.inputs(raw)), rtol=1e-5, atol=1e-5)


def test_folding_leaves_the_original_alone():
    clt = random_transcoder(2, 3, 2).float()
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    fold(clt, Scaling.by_layer(torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]), 2))
    assert all(torch.equal(before[name], value) for name, value in clt.state_dict().items())
