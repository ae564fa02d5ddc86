import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core import plugins, reference
from tests.core.coders import gradients, options, small, tokens_for

from circuitmill.config.train import NONLINEARITIES as CONFIGURED
from circuitmill.config.train import TOP_K
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings, find_nonlinearity, jumprelu, step
from circuitmill.core.parts import largest
from circuitmill.errors import ConfigError
from circuitmill.training.objective import Moment, evaluate_batch, evaluation

few = settings(max_examples=8, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))


def same(ours, theirs, *parameters):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3))
    for one, other in zip(*(gradients(value, list(parameters), upstream) for value in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def made(shape, seed, levels=0):
    """Random pre-activations and log-thresholds; with levels, of few different values, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(shape, dtype=torch.float64, generator=generator)
    if levels:
        pre = (pre * levels).round() / levels
    log = torch.randn(shape[1:], dtype=torch.float64, generator=generator) * 0.3 - 0.5
    return pre.requires_grad_(), log.requires_grad_()


def test_the_configuration_names_the_rows():
    assert set(CONFIGURED) == set(NONLINEARITIES)


@pytest.mark.parametrize("name", [name for name in NONLINEARITIES if name not in ("jumprelu", "groupmax")])
@pytest.mark.parametrize("levels", [0, 2], ids=["distinct", "ties"])
@few
@given(shapes, st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.5, 3.0, 6.0]))
def test_values_and_gradients_equal_the_loop(name, levels, shape, k):
    *sizes, seed = shape
    pre, log = made(sizes, seed, levels)
    ours = NONLINEARITIES[name](pre, log, Settings(k=k))
    same(ours, reference.activations(name, pre, k=k), pre, log)


@pytest.mark.parametrize("levels", [0, 2], ids=["distinct", "ties"])
@few
@given(shapes, st.integers(1, 3))
def test_groupmax_equals_the_loop(levels, shape, size):
    n_tokens, sources, groups, seed = shape
    pre, log = made((n_tokens, sources, groups * size), seed, levels)
    a = NONLINEARITIES["groupmax"](pre, log, Settings(k=float(groups)))
    same(a, reference.activations("groupmax", pre, k=groups), pre, log)
    by_group = (a > 0).view(n_tokens, sources, groups, size).sum(dim=3)
    assert (by_group <= 1).all() and (a > 0).sum(dim=2).max() <= groups


@pytest.mark.parametrize("derivative", ["chain", "direct"])
@pytest.mark.parametrize("pass_through", [False, True])
@few
@given(shapes, st.sampled_from([0.3, 2.0]))
def test_jumprelu_equals_the_loop(derivative, pass_through, shape, bandwidth):
    *sizes, seed = shape
    pre, log = made(sizes, seed)
    settings_ = Settings(bandwidth=bandwidth, derivative=derivative, pass_through=pass_through)
    ours = NONLINEARITIES["jumprelu"](pre, log, settings_)
    theirs = reference.jumprelu(pre, log, bandwidth, derivative, pass_through)
    same(ours, theirs, pre, log)


@pytest.mark.parametrize("derivative", ["chain", "direct"])
@pytest.mark.parametrize("pass_through", [False, True])
@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_gradients_equal_the_stated_formula(derivative, pass_through, bandwidth):
    pre, log = (part[:, 0] if part.ndim == 3 else part[0] for part in made((50, 1, 4), 0))
    upstream = torch.randn(50, 4, dtype=torch.float64)
    ours = torch.autograd.grad(jumprelu(pre, log, bandwidth, derivative, pass_through), (pre, log), upstream)
    theirs = reference.jumprelu_gradients(pre.detach(), log.detach(), upstream, bandwidth, derivative, pass_through)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("needed", ["pre", "log"])
def test_gradients_do_not_depend_on_which_are_asked_for(needed):
    pre, log = made((9, 2, 3), 0)
    asked = {"pre": pre, "log": log}[needed]
    both = torch.autograd.grad(jumprelu(pre, log, pass_through=True).sum(), (pre, log))
    other = jumprelu(pre if asked is pre else pre.detach(), log if asked is log else log.detach(), pass_through=True)
    (alone,) = torch.autograd.grad(other.sum(), asked)
    assert torch.equal(alone, both[0] if needed == "pre" else both[1]) and alone.any()


@pytest.mark.parametrize("derivative", ["chain", "direct"])
@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_step_equals_the_loop(derivative, bandwidth):
    pre, log = made((7, 2, 3), 1)
    theirs = reference.stacked(
        [
            [[reference.step(pre[t, s, i], log[s, i], bandwidth, derivative) for i in range(3)] for s in range(2)]
            for t in range(7)
        ]
    )
    ours = step(pre, log, bandwidth, derivative)
    assert ours.tolist() == (pre > log.exp()).double().tolist()
    same(ours, theirs, pre, log)


@pytest.mark.parametrize("function", [jumprelu, step])
@pytest.mark.parametrize(("derivative", "factor"), [("chain", 1.0), ("direct", math.exp(0.3))])
def test_threshold_gradient_estimates_the_slope_of_the_expectation(function, derivative, factor):
    # h uniform on [0, 3]: d/dt E[a] = -theta * theta * density and d/dt E[H] = -theta * density, for t = log(theta)
    n_tokens = 200_001
    pre = torch.linspace(0, 3, n_tokens, dtype=torch.float64)[:, None]
    log_threshold = torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)
    mean = function(pre, log_threshold, 0.2, derivative).mean()
    (gradient,) = torch.autograd.grad(mean, log_threshold)
    small_step = 1e-2
    up, down = (function(pre, log_threshold.detach() + sign * small_step, 0.2).mean() for sign in (1, -1))
    assert gradient.item() == pytest.approx(factor * (up - down).item() / (2 * small_step), rel=2e-3)


def test_all_layers_at_once_and_chosen_entries_give_the_same():
    torch.manual_seed(0)
    pre, log_threshold = torch.randn(6, 2, 3), torch.randn(2, 3)
    whole = jumprelu(pre, log_threshold)
    torch.testing.assert_close(jumprelu(pre[:, 1], log_threshold[1]), whole[:, 1])
    entries = jumprelu(pre.flatten(), log_threshold.expand(6, 2, 3).flatten())
    torch.testing.assert_close(entries.view(6, 2, 3), whole)


L0 = {
    # what is exactly so large: (axes to sum over, number) for 6 tokens, 3 sources, k
    "topk": lambda k: ((2,), round(k)),
    "token_topk": lambda k: ((1, 2), round(3 * k)),
    "batch_topk": lambda k: ((0, 2), round(6 * k)),
    "batch_topk_all": lambda k: ((0, 1, 2), round(18 * k)),
    "groupmax": lambda k: ((2,), round(k)),
}


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("k", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
def test_realised_l0_is_exact(name, k, kind):
    torch.manual_seed(2)
    pre = torch.rand(6, 3, 8) + 0.1
    if kind == "ties":
        pre = (pre * 3).ceil()
    if kind == "all equal":
        pre = torch.ones(6, 3, 8)
    axes, wanted = L0[name](k)
    a = NONLINEARITIES[name](pre, torch.zeros(3, 8), Settings(k=k))
    assert ((a > 0).sum(dim=axes) == wanted).all()
    assert torch.equal(a[a > 0], pre[a > 0])


@pytest.mark.parametrize("name", ["batch_topk", "batch_topk_all"])
@pytest.mark.parametrize("k", [0.25, 0.5, 1.75, 8.0])
def test_k_of_a_batch_may_be_a_fraction(name, k):
    pre = torch.rand(4, 3, 8) + 0.1
    a = NONLINEARITIES[name](pre, torch.zeros(3, 8), Settings(k=k))
    assert (a > 0).sum().item() == 4 * 3 * k
    if name == "batch_topk":
        assert (a > 0).sum(dim=(0, 2)).tolist() == [4 * k] * 3


@pytest.mark.parametrize("name", TOP_K)
def test_fewer_positive_than_k_are_all_kept(name):
    torch.manual_seed(3)
    pre = torch.randn(5, 2, 8) - 1.5
    pre[0] = -1
    assert 0 < (pre > 0).sum() < 20
    k = 8.0
    a = NONLINEARITIES[name](pre, torch.zeros(2, 8), Settings(k=k))
    assert torch.equal(a, pre.relu())


@pytest.mark.parametrize("name", TOP_K)
def test_of_equal_values_the_first_are_kept(name):
    pre = torch.ones(2, 2, 4)
    kept = NONLINEARITIES[name](pre, torch.zeros(2, 4), Settings(k=1.0)) > 0
    first = torch.zeros(2, 2, 4, dtype=torch.bool)
    if name in ("topk", "groupmax"):
        first[:, :, 0] = True
    elif name == "token_topk":
        first[:, 0, :2] = True
    elif name == "batch_topk":
        first[0, :, :2] = True
    else:
        first[0, 0] = True
    assert torch.equal(kept, first)


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 8), st.integers(0, 99))
def test_largest_are_k_and_of_equal_ones_the_first(n_rows, n_columns, k, seed):
    values = torch.randint(0, 3, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.zeros(n_rows, n_columns, dtype=torch.bool)
    for row in range(n_rows):
        for column in sorted(range(n_columns), key=lambda column: -values[row, column].item())[:k]:
            expected[row, column] = True
    assert torch.equal(largest(values, k), expected)


def moment_of(coder):
    like = coder.log_threshold.detach()
    return Moment(0, torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like))


@pytest.mark.parametrize("name", NONLINEARITIES)
@pytest.mark.parametrize("row", ["clt", "crosscoder"])
def test_activations_of_a_training_step_equal_the_loop(name, row):
    coder = small(row, n_features=6)
    k = 0.0 if name in ("relu", "jumprelu") else 2.0
    cfg = options(coder, nonlinearity__name=name, nonlinearity__k=k, nonlinearity__bandwidth=1.5)
    x = tokens_for(coder)
    batch = evaluation(coder, x, x, cfg, moment_of(coder))
    pre = reference.pre_activations(coder, x)
    theirs = (
        reference.jumprelu(pre, coder.log_threshold, 1.5)
        if name == "jumprelu"
        else reference.activations(name, pre, k=k)
    )
    ours = torch.stack([a.dense() for a in batch.a], dim=1)
    same(ours, theirs, coder.W_enc, coder.b_enc, coder.log_threshold)
    same(batch.y_hats[-1], reference.decode(coder, theirs, x), *coder.parameters())


def test_a_function_of_ones_own():
    coder = small("clt", n_features=6)
    cfg = options(
        coder, nonlinearity__name="tests.core.plugins:above_half", loss={"reconstruction": {"coefficient": 1}}
    )
    x = tokens_for(coder)
    assert find_nonlinearity("tests.core.plugins:above_half") is plugins.above_half
    result = evaluate_batch(coder, x, x, cfg, moment_of(coder))
    assert result.firings.tolist() == (coder.pre_activations(x) > 0.5).sum(dim=0).tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "jumprellu",
            r"relu, jumprelu, .*found 'jumprellu'\n  where: train.nonlinearity.name\n  fix:   nearest: jumprelu",
        ),
        ("Top-K", r"nearest: token_topk|nearest: topk"),
        ("nowhere.to.be.found:function", r"`module:function` of an installed module; found 'nowhere.to.be.found:"),
        ("tests..core:function", r"`module:function` of an installed module; found 'tests..core:function'"),
        (
            "tests.core.plugins:missing",
            r"a function that can be imported; found tests.core.plugins:missing \(.*missing",
        ),
        ("tests.core.plugins:NUMBER", r"a function; found tests.core.plugins:NUMBER, int\n  where: train.nonlinearity"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_nonlinearity(name)
