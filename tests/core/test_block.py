import pytest
import torch

from circuitmill.core.block import FeatureBlock
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError


@pytest.fixture
def clt() -> Transcoder:
    transcoder = Transcoder(n_layers=3, n_features=7, d_model=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        transcoder.log_threshold.fill_(-1.0)
    return transcoder


def test_features_are_numbered_layer_after_layer(clt: Transcoder) -> None:
    x = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(1))
    block = FeatureBlock(clt, slice(2, 5))
    assert (block.width, block.n_features) == (3, 9)
    expected = clt.encode(x)[:, :, 2:5].flatten(1)
    torch.testing.assert_close(block.encode(x), expected)
    assert (expected > 0).any()


def test_logit_weights_against_loops(clt: Transcoder) -> None:
    unembedding = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))
    found = FeatureBlock(clt, slice(1, 3)).logits(unembedding, k=3)
    for number in range(6):
        layer, feature = number // 2, 1 + number % 2
        vector = torch.stack([clt.W_dec[layer][feature, target] for target in range(3 - layer)]).sum(0)
        effects = [float(row @ vector.detach()) for row in unembedding]
        centred = [effect - sum(effects) / 11 for effect in effects]
        order = sorted(range(11), key=lambda token: -centred[token])
        assert found.top_tokens[number].tolist() == order[:3]
        assert found.bottom_tokens[number].tolist() == order[::-1][:3]
        torch.testing.assert_close(found.top[number], torch.tensor([centred[token] for token in order[:3]]))
    assert FeatureBlock(clt, slice(1, 3)).logits(unembedding, k=50).top.shape == (6, 11)


@pytest.mark.parametrize("span", [slice(3, 3), slice(5, 8)])
def test_an_empty_or_overlong_span_is_refused(clt: Transcoder, span: slice) -> None:
    with pytest.raises(ShapeError, match=r"a block of features within 0 to 7; found \d to \d"):
        FeatureBlock(clt, span)
