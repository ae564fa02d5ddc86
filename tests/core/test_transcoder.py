import dataclasses

import pytest
import torch
from hypothesis import given, settings
from tests.core import reference
from tests.core.coders import (
    ROWS,
    drawn,
    options,
    random_transcoder,
    same_with_gradients,
    shapes,
    small,
    tokens_for,
)

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.training.objective import Moment, evaluation

few = settings(max_examples=5, deadline=None, derandomize=True)


@pytest.mark.parametrize("row", ROWS)
@few
@given(shapes)
def test_values_and_gradients_equal_the_double_loop(row, shape):
    coder, x = drawn(ROWS[row], shape)
    pre, a = reference.encode(coder, x)
    same_with_gradients(coder.pre_activations(x), pre, coder)
    same_with_gradients(coder.encode(x), a, coder)
    same_with_gradients(coder(x), reference.decode(coder, a, x), coder)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["concatenated", "summed"])
@few
@given(shapes)
def test_norms_equal_the_double_loop(row, kind, shape):
    coder, _ = drawn(ROWS[row], shape)
    same_with_gradients(coder.decoder_norms(kind), reference.norms(coder, kind), coder)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_matryoshka_prefixes_equal_the_double_loop(row, way):
    form = ROWS[row]
    n_features = 6
    prefixes = (1, 2, 5, n_features)
    coder = random_transcoder(2, n_features, 2, architecture=dataclasses.replace(form, prefixes=prefixes))
    cfg = options(coder, nonlinearity__bandwidth=1.0, products=way)
    x = tokens_for(coder)
    like = coder.log_threshold.detach()
    batch = evaluation(coder, x, x, cfg, Moment(0, torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like)))
    _, a = reference.encode(coder, x)
    assert len(batch.y_hats) == len(prefixes)
    for ours, first in zip(batch.y_hats, prefixes, strict=True):
        same_with_gradients(ours, reference.decode(coder, a, x, first), coder)


@pytest.mark.parametrize("row", ROWS)
def test_parts_of_a_source_are_parts_of_the_whole(row):
    coder = small(row, n_features=6)
    x = tokens_for(coder)
    whole, pre = coder.encode(x), coder.pre_activations(x)
    for source in range(coder.n_sources):
        torch.testing.assert_close(coder.pre_activations_source(source, x), pre[:, source])
        torch.testing.assert_close(coder.encode_source(source, x), whole[:, source])
        torch.testing.assert_close(coder.encode_source(source, x, slice(2, 5)), whole[:, source, 2:5])
        if coder.topology.reads_one:
            torch.testing.assert_close(coder.encode_layer(source, x[:, source], slice(2, 5)), whole[:, source, 2:5])
        else:
            with pytest.raises(ShapeError, match=r"features that read one layer; found topology crosscoder"):
                coder.encode_layer(source, x[:, source])


@pytest.mark.parametrize("row", ROWS)
def test_what_sources_write_adds_up_to_the_reconstruction(row):
    coder = small(row)
    x = tokens_for(coder)
    a = coder.encode(x)
    written = [coder.decode_layer(source, a[:, source], x[:, source]) for source in range(coder.n_sources)]
    torch.testing.assert_close(coder.add_up(written, x), coder(x), rtol=0, atol=1e-12)
    nothing = [torch.zeros_like(part) for part in written]
    silent = reference.decode(coder, torch.zeros_like(a), x)
    torch.testing.assert_close(coder.add_up(nothing, x), silent, rtol=0, atol=1e-12)


def test_all_kinds_of_norm_are_named():
    assert torch.equal(small("clt").decoder_norms(), small("clt").decoder_norms("concatenated"))
    with pytest.raises(ConfigError, match=r"concatenated or summed; found 'longest'"):
        small("clt").decoder_norms("longest")


def test_norm_is_of_the_concatenated_decoder_or_the_sum():
    clt = random_transcoder(2, 1, 2)
    with torch.no_grad():
        clt.W_dec[0].copy_(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    assert clt.decoder_norms()[0, 0].item() == pytest.approx(5.0)
    assert clt.decoder_norms("summed")[0, 0].item() == pytest.approx(7.0)


@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_the_threshold_itself_does_not_fire(threshold):
    clt = Transcoder(1, 1, 1)
    x = torch.tensor([[[threshold]], [[threshold + 0.001]]])
    with torch.no_grad():
        clt.W_enc.fill_(1.0)
        clt.log_threshold.copy_(torch.tensor(threshold).log())
    assert clt.encode(x).flatten().tolist() == [0.0, pytest.approx(threshold + 0.001)]


@pytest.mark.parametrize("row", ["clt skip", "molt"])
def test_what_needs_the_input_says_so(row):
    coder = small(row)
    a = coder.encode(tokens_for(coder))
    with pytest.raises(ShapeError, match=r"activations alone\n  where: decode\n  fix:   pass the MLP inputs x too"):
        coder.decode(a)


def test_inputs_are_needed_by_nothing_else():
    for row, form in ROWS.items():
        if form.topology != "molt" and not form.skip:
            coder = small(row)
            x = tokens_for(coder)
            assert torch.equal(coder.decode(coder.encode(x)), coder(x)), row


def test_skip_is_a_map_from_a_layers_input_to_its_output():
    coder = small("clt skip")
    x = tokens_for(coder)
    assert coder.W_skip is not None
    same_with_gradients(coder.skip_layer(1, x[:, 1]), torch.einsum("oi,ti->to", coder.W_skip[1], x[:, 1]), coder)
    assert not small("clt").skip_layer(0, x[:, 0]).any()


@pytest.mark.parametrize("name", ["n_layers", "n_features", "d_model"])
def test_a_size_of_zero_is_refused(name):
    n_layers, n_features, d_model = (0 if own == name else 2 for own in ("n_layers", "n_features", "d_model"))
    with pytest.raises(ShapeError, match=rf"expected a size of at least 1; found 0\n  where: {name}"):
        Transcoder(n_layers, n_features, d_model)


def test_what_does_not_fit_the_architecture_is_refused():
    with pytest.raises(ShapeError, match=r"as many layers of each of 2 models; found 3 layers"):
        Transcoder(3, 2, 3, ArchitectureConfig("crosscoder", models=2))
    with pytest.raises(ConfigError, match=r"multiple of 3 .*found n_features 4\n  where: train.architecture.ranks"):
        Transcoder(2, 4, 3, ArchitectureConfig("molt", ranks=(2, 1)))


def test_decoder_vectors_as_parameters_belong_to_the_untied_form():
    assert len(small("clt").W_dec) == 2
    for row, name in {"target": "TargetTied", "crosscoder shared": "SharedOverModels", "molt": "Mixture"}.items():
        with pytest.raises(ShapeError, match=rf"a decoder per source and target; found {name}\n .*\n .*decoder_block"):
            _ = small(row).W_dec


def test_finished_transcoders_are_jumprelu_or_relu():
    coder = small("plt")
    x = tokens_for(coder)
    with torch.no_grad():
        coder.log_threshold.fill_(-torch.inf)
    relu = NONLINEARITIES["relu"](coder.pre_activations(x), coder.log_threshold, Settings())
    assert torch.equal(coder.encode(x), relu)
