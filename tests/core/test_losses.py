import dataclasses

import pytest
import torch
from tests.core import plugins, reference
from tests.core.coders import ROWS, options, random_transcoder, same_with_gradients, small, tokens_for

from circuitmill.config.train import END_TO_END, TermConfig
from circuitmill.config.train import TERMS as CONFIGURED
from circuitmill.core.encoding import encode, sources_of
from circuitmill.core.losses import TERMS, Evaluation, find_term, squared_error
from circuitmill.core.nonlinearity import Settings
from circuitmill.errors import ConfigError
from circuitmill.training import objective

BANDWIDTH = 0.8
KERNEL = {
    "chain": Settings(bandwidth=BANDWIDTH),
    "direct": Settings(bandwidth=BANDWIDTH, derivative="direct"),
    "through": Settings(bandwidth=BANDWIDTH, pass_through=True),
}


def dead_of(coder):
    """About half of the features."""
    torch.manual_seed(4)
    return torch.rand_like(coder.log_threshold) < 0.5


def density_of(coder):
    torch.manual_seed(5)
    return torch.rand_like(coder.log_threshold)


def evaluated(coder, x, y, kind="dense", settings=KERNEL["chain"], dead=None):
    settings = dataclasses.replace(settings, most={"sparse": 1.0, "dense": -1.0}[kind])
    encodings = encode(sources_of(coder, x), "jumprelu", settings)
    written = [coder.decoder.written(source, one.a, x[:, source]) for source, one in enumerate(encodings)]
    dead = dead_of(coder) if dead is None else dead
    return Evaluation(coder, x, y, encodings, [coder.add_up(written, x)], settings, dead, density_of(coder))


def in_loops(coder, x, y, settings=KERNEL["chain"]):
    """Pre-activations and activations; and every term as a function of its options."""
    own = {"bandwidth": settings.bandwidth, "derivative": settings.derivative}
    pre, a = reference.encode(coder, x, **own, pass_through=settings.pass_through)
    return {
        "reconstruction": lambda term: reference.reconstruction(y, reference.decode(coder, a, x)),
        "tanh_sparsity": lambda term: reference.tanh_sparsity(
            coder, a, term.scale, term.norm or "concatenated", term.features or "all"
        ),
        "l1": lambda term: reference.l1(coder, a, term.norm or "concatenated", term.features or "all"),
        "quadratic_l0": lambda term: reference.quadratic_l0(coder, pre, term.target, **own),
        "frequency": lambda term: reference.frequency(coder, pre, density_of(coder), term.scale, **own),
        "pre_activation": lambda term: reference.pre_activation(coder, pre, term.norm or "concatenated"),
        "auxiliary": lambda term: reference.auxiliary(coder, x, y, pre, a, dead_of(coder), term.k),
    }


TERM = {
    "reconstruction": TermConfig(1.0),
    "tanh_sparsity": TermConfig(1.0, scale=1.7),
    "l1": TermConfig(1.0),
    "quadratic_l0": TermConfig(1.0, target=1.5),
    "frequency": TermConfig(1.0, scale=0.1),
    "pre_activation": TermConfig(1.0),
    "auxiliary": TermConfig(1.0, k=2),
}
"""One use of every term."""


def batch_of(coder, n_tokens=4):
    return tokens_for(coder, n_tokens), tokens_for(coder, n_tokens, seed=2)


def test_the_configuration_names_the_terms():
    assert set(CONFIGURED) - set(END_TO_END) == set(TERM) == set(TERMS) - set(END_TO_END)


@pytest.mark.parametrize(
    "row", ["clt", "plt skip", "crosscoder shared", "molt", "source pairs", "target pairs", "low rank"]
)
@pytest.mark.parametrize("name", TERM)
def test_terms_equal_the_loop_for_every_kind_of_decoder(name, row):
    coder = small(row)
    x, y = batch_of(coder)
    theirs = in_loops(coder, x, y)[name](TERM[name])
    for kind in ("dense", "sparse"):
        same_with_gradients(TERMS[name](evaluated(coder, x, y, kind), TERM[name]), theirs, coder)


@pytest.mark.parametrize("name", TERM)
@pytest.mark.parametrize("kernel", ["direct", "through"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_terms_equal_the_loop_for_every_kernel(name, kernel, kind):
    coder = small("clt", n_features=5)
    x, y = batch_of(coder, 6)
    settings = KERNEL[kernel]
    ours = TERMS[name](evaluated(coder, x, y, kind, settings), TERM[name])
    same_with_gradients(ours, in_loops(coder, x, y, settings)[name](TERM[name]), coder)


@pytest.mark.parametrize("features", [None, "all", "shared", "exclusive"])
@pytest.mark.parametrize("norm", [None, "concatenated", "summed"])
@pytest.mark.parametrize("name", ["tanh_sparsity", "l1"])
def test_norms_and_kinds_of_features_equal_the_loop(name, norm, features):
    form = dataclasses.replace(ROWS["crosscoder shared"], shared=2)
    coder = random_transcoder(4, 5, 2, architecture=form)
    x, y = batch_of(coder)
    term = dataclasses.replace(TERM[name], norm=norm, features=features)
    theirs = in_loops(coder, x, y)[name](term)
    for kind in ("dense", "sparse"):
        same_with_gradients(TERMS[name](evaluated(coder, x, y, kind), term), theirs, coder)


def test_shared_and_exclusive_features_are_all_features():
    coder = small("crosscoder shared", n_features=5)
    batch = evaluated(coder, *batch_of(coder))
    whole, *parts = (
        TERMS["l1"](batch, TermConfig(1.0, norm="summed", features=features))
        for features in ("all", "shared", "exclusive")
    )
    torch.testing.assert_close(sum(parts), whole)
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize("norm", ["concatenated", "summed"])
def test_pre_activation_takes_either_norm_and_no_gradient_from_it(norm):
    coder = small("clt", n_features=5)
    x, y = batch_of(coder)
    term = TermConfig(1.0, norm=norm)
    ours = TERMS["pre_activation"](evaluated(coder, x, y), term)
    same_with_gradients(ours, in_loops(coder, x, y)["pre_activation"](term), coder)
    by_decoder = torch.autograd.grad(ours, list(coder.W_dec), allow_unused=True)
    assert by_decoder == (None, None)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_auxiliary_equals_the_loop_and_is_weighted_down_while_few_are_dead(k):
    coder = small("clt", n_features=5)
    x, y = batch_of(coder)
    term = TermConfig(1.0, k=k)
    ours = TERMS["auxiliary"](evaluated(coder, x, y), term)
    same_with_gradients(ours, in_loops(coder, x, y)["auxiliary"](term), coder)
    n_dead = int(dead_of(coder).sum())
    assert 1 < n_dead < 9


def test_auxiliary_without_dead_features_is_zero():
    coder = small("clt")
    batch = evaluated(coder, *batch_of(coder), dead=torch.zeros_like(coder.log_threshold, dtype=torch.bool))
    assert TERMS["auxiliary"](batch, TERM["auxiliary"]).item() == 0


def test_auxiliary_reaches_dead_features_alone():
    coder = small("clt", n_features=5)
    x, y = batch_of(coder, 8)
    loss = TERMS["auxiliary"](evaluated(coder, x, y), TERM["auxiliary"])
    named = {"W_enc": coder.W_enc, "b_enc": coder.b_enc} | {f"W_dec {s}": one for s, one in enumerate(coder.W_dec)}
    dead = dead_of(coder)
    for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        rows = dead[int(name[-1])] if name.startswith("W_dec") else dead
        assert gradient[rows].any() and not gradient[~rows].any(), name
    (by_bias,) = torch.autograd.grad(
        TERMS["auxiliary"](evaluated(coder, x, y), TERM["auxiliary"]), coder.b_dec, allow_unused=True
    )
    assert by_bias is None


@pytest.mark.parametrize("name", TERM)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("row", ["clt", "crosscoder shared", "molt"])
def test_mean_over_equal_parts_is_the_whole(name, kind, row):
    coder = small(row, n_features=6)
    x, y = batch_of(coder, 8)
    whole = TERMS[name](evaluated(coder, x, y, kind), TERM[name])
    assert whole.abs() > 1e-3
    for size in (4, 2, 1):
        rows = [slice(low, low + size) for low in range(0, 8, size)]
        parts = [TERMS[name](evaluated(coder, x[row], y[row], kind), TERM[name]) for row in rows]
        torch.testing.assert_close(sum(parts) / len(parts), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("row", ["clt", "plt skip", "target pairs", "low rank", "crosscoder shared", "molt"])
def test_matryoshka_reconstruction_is_the_mean_over_prefixes(row, kind):
    prefixes = (1, 3, 6)
    coder = random_transcoder(2, 6, 2, architecture=dataclasses.replace(ROWS[row], prefixes=prefixes))
    x, y = batch_of(coder)
    cfg = options(coder, nonlinearity__bandwidth=BANDWIDTH, products=kind)
    moment = objective.Moment(0, dead_of(coder), density_of(coder))
    ours = TERMS["reconstruction"](objective.evaluation(coder, x, y, cfg, moment), TERM["reconstruction"])
    _, a = reference.encode(coder, x, bandwidth=BANDWIDTH)
    theirs = sum(reference.reconstruction(y, reference.decode(coder, a, x, first)) for first in prefixes) / 3
    same_with_gradients(ours, theirs, coder)


def test_the_bias_is_in_every_prefix():
    coder = random_transcoder(2, 6, 2, architecture=dataclasses.replace(ROWS["clt skip"], prefixes=(1, 6)))
    x, y = batch_of(coder)
    moment = objective.Moment(0, dead_of(coder), density_of(coder))
    batch = objective.evaluation(coder, x, y, options(coder), moment)
    for y_hat in batch.y_hats:
        (gradient,) = torch.autograd.grad(y_hat.sum(), coder.b_dec, retain_graph=True)
        assert torch.equal(gradient, torch.full_like(gradient, 4.0))


def test_squared_error_is_summed_over_layers_and_averaged_over_tokens():
    torch.manual_seed(0)
    y, y_hat = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 3).double()
    torch.testing.assert_close(squared_error(y, y_hat), reference.reconstruction(y, y_hat), rtol=0, atol=1e-12)


def test_the_loss_is_the_weighted_sum():
    coder = small("clt")
    x, y = batch_of(coder)
    loss = {
        "reconstruction": {"coefficient": 1.0},
        "l1": {"coefficient": 0.5, "ramp_share": 1.0},
        "quadratic_l0": {"coefficient": 0.0, "target": 2.0},
        "frequency": {"coefficient": 3.0, "scale": 0.1},
    }
    cfg = options(coder, loss=loss, nonlinearity__bandwidth=BANDWIDTH)
    moment = objective.Moment(cfg.tokens // 4, dead_of(coder), density_of(coder))
    result = objective.evaluate_batch(coder, x, y, cfg, moment)
    assert list(result.terms) == ["reconstruction", "l1", "frequency"]
    theirs = in_loops(coder, x, y)
    total = (
        theirs["reconstruction"](TERM["reconstruction"])
        + 0.125 * theirs["l1"](TERM["l1"])
        + 3 * theirs["frequency"](TERM["frequency"])
    )
    same_with_gradients(result.loss, total, coder)


def test_a_term_of_ones_own():
    name = "tests.core.plugins:squared_activations"
    assert find_term(name) is plugins.squared_activations
    coder = small("clt")
    x, y = batch_of(coder)
    cfg = options(coder, loss={name: {"coefficient": 2.0, "scale": 3.0}}, nonlinearity__bandwidth=BANDWIDTH)
    result = objective.evaluate_batch(coder, x, y, cfg, objective.Moment(0, dead_of(coder), density_of(coder)))
    _, a = reference.encode(coder, x, bandwidth=BANDWIDTH)
    same_with_gradients(result.loss, 6 * (a**2).sum() / len(x), coder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "reconstructoin",
            r"found 'reconstructoin'\n  where: train.loss.reconstructoin\n  fix:   nearest: reconstruction",
        ),
        ("tanh", r"nearest: tanh_sparsity"),
        ("nowhere.to.be.found:function", r"`module:function` of an installed module"),
        ("tests.core.plugins:missing", r"a function that can be imported; found tests.core.plugins:missing"),
        ("tests.core.plugins:NUMBER", r"a function; found tests.core.plugins:NUMBER, int"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_term(name)
