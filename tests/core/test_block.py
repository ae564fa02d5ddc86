import pytest
import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.block import FeatureBlock, LogitWeights
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


def random(n_layers: int, n_features: int, **architecture: object) -> Transcoder:
    transcoder = Transcoder(n_layers, n_features, 4, ArchitectureConfig(**architecture))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return transcoder.requires_grad_(False)


UNEMBEDDING = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))


def assert_reads(found: LogitWeights, vectors: torch.Tensor) -> None:
    """The logit weights are those of these vectors."""
    effects = vectors @ (UNEMBEDDING - UNEMBEDDING.mean(0)).T
    torch.testing.assert_close(found.top, effects.sort(dim=1, descending=True).values[:, :3])
    torch.testing.assert_close(found.bottom, effects.sort(dim=1).values[:, :3])
    assert torch.equal(found.top_tokens[:, 0], effects.argmax(dim=1))


@pytest.mark.parametrize("shared", [0, 2])
def test_a_crosscoder_over_models_promotes_what_it_writes_for_the_last_model(shared: int) -> None:
    transcoder = random(6, 5, topology="crosscoder", models=2, shared=shared)
    block = FeatureBlock(transcoder, slice(1, 5))
    assert block.n_features == 4
    x = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block.encode(x), transcoder.encode(x)[:, 0, 1:5])
    assert_reads(block.logits(UNEMBEDDING, 3), transcoder.decoder_block(0)[1:5, 3:].sum(1))


def test_a_crosscoder_of_one_model_promotes_what_it_writes_to_all_layers() -> None:
    transcoder = random(3, 5, topology="crosscoder")
    assert_reads(FeatureBlock(transcoder, slice(0, 5)).logits(UNEMBEDDING, 3), transcoder.decoder_block(0).sum(1))


@pytest.mark.parametrize("decoder", ["target", "source"])
@pytest.mark.parametrize("scale", [False, True])
def test_offsets_do_not_count_as_what_a_unit_of_activation_adds(decoder: str, scale: bool) -> None:
    transcoder = random(3, 5, decoder=decoder, pair_scale=scale, pair_offset=True)
    block = FeatureBlock(transcoder, slice(1, 4))
    steps = []
    for source in range(3):
        one, two = (torch.eye(5)[1:4] * activation for activation in (1.0, 2.0))
        steps.append((transcoder.decode_layer(source, two) - transcoder.decode_layer(source, one)).sum(dim=1))
    assert_reads(block.logits(UNEMBEDDING, 3), torch.cat(steps))


def test_a_mixture_has_activations_and_promotes_nothing() -> None:
    transcoder = random(2, 6, topology="molt", ranks=(2, 1))
    block = FeatureBlock(transcoder, slice(2, 6))
    x = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block.encode(x), transcoder.encode(x)[:, :, 2:6].flatten(1))
    found = block.logits(UNEMBEDDING, 3)
    assert found.top.shape == found.bottom_tokens.shape == (8, 0)
