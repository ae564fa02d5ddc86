import math
import sys
from typing import Any

import pytest
import schedulefree
import torch
from tests.training.helpers import fresh, run
from tests.training.kinds import KINDS, check_resuming, held_out_ev, kind

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import TermConfig
from circuitmill.core.muon import orthogonalised
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.training.parallel.plan import impossible
from circuitmill.training.state import make_state

NO_REVIVAL = {"loss__pre_activation": TermConfig(0.0), "loss__auxiliary": TermConfig(0.0, k=1)}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_learns_the_task(name):
    cfg = kind(name, tokens=6400)
    state = fresh(cfg)
    before = held_out_ev(cfg, state)
    state, rows = run(cfg, state)
    assert before < 0.0 and 0.93 < held_out_ev(cfg, state) < 0.999
    assert 0.93 < rows[-1]["ev"] < 0.999


@pytest.mark.parametrize("name", KINDS)
def test_resuming_gives_the_same_bits(name):
    assert all(step > 0 for step in check_resuming(kind(name), (1, 7, 20)))


def steps_by(state, seed=0, steps=3, lr=1e-2):
    """Random gradients for every parameter, and the updates that they give."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for parameter in state.optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        state.optimizer.step(lr, norm=1.0, number=number)


def test_adam_and_adamw_are_torchs():
    for name, inner in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        state, other = fresh(kind(name)), fresh(kind(name))
        steps_by(state)
        decay = {"weight_decay": 0.0} if name == "adam" else {"weight_decay": 0.01}
        parameters = list(other.transcoder.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim == 3], **decay},
            {"params": [p for p in parameters if p.ndim != 3], "weight_decay": 0.0},
        ]
        reference = inner(groups, lr=1e-2, betas=(0.9, 0.99), fused=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            reference.step()
        for parameter, expected in zip(state.transcoder.parameters(), parameters, strict=True):
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_weight_decay_takes_from_matrices_alone(name):
    with_decay = fresh(kind(name, optimizer__weight_decay=0.5))
    without = fresh(kind(name, optimizer__weight_decay=0.0))
    steps_by(with_decay)
    steps_by(without)
    for ours, theirs in zip(with_decay.transcoder.parameters(), without.transcoder.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (ours.ndim < 3)


def test_moments_are_kept_in_8_bits():
    state = fresh(kind("adam8bit"))
    steps_by(state)
    found = state.tensors()
    W_enc = state.transcoder.W_enc
    codes, scale = found["optimizer/exp_avg.codes/W_enc"], found["optimizer/exp_avg.scale/W_enc"]
    assert codes.dtype == torch.uint8 and codes.shape == W_enc.shape and scale.numel() == W_enc.numel() // 256
    assert found["optimizer/exp_avg_sq.codes/W_enc"].dtype == torch.uint8
    assert found["optimizer/exp_avg/b_enc"].dtype == torch.float32
    start, exact = fresh(kind("adam8bit")), fresh(kind("adam8bit", optimizer__name="adam"))
    steps_by(exact)
    for parameter, name in exact.optimizer.names.items():
        ours, before = state.transcoder.get_parameter(name), start.transcoder.get_parameter(name)
        assert (ours - parameter).norm() < 0.1 * (parameter - before).norm(), name


def test_muon_orthogonalises_each_source_and_layer_by_itself():
    state, start = fresh(kind("muon", optimizer__weight_decay=0.0)), fresh(kind("muon")).transcoder
    generator = torch.Generator().manual_seed(5)
    gradients = {}
    for parameter, name in state.optimizer.names.items():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        gradients[name] = parameter.grad.clone()
    state.optimizer.step(0.1, norm=1.0, number=0)
    for name, matrices in (("W_enc", 2), ("decoder.W_dec.0", 2), ("decoder.W_dec.1", 1)):
        axis = 0 if name == "W_enc" else 1
        moved = state.transcoder.get_parameter(name) - start.get_parameter(name)
        assert moved.shape[axis] == matrices
        for index in range(matrices):
            direction = orthogonalised(gradients[name].select(axis, index))
            expected = -0.1 * 0.2 * 16**0.5 * direction
            torch.testing.assert_close(moved.select(axis, index).detach(), expected, rtol=0.02, atol=2e-3)
    # vectors as Adam: the first step is the rate
    torch.testing.assert_close((state.transcoder.b_enc - start.b_enc).abs().detach(), torch.full((2, 16), 0.1))


def test_averages_are_what_is_evaluated_saved_and_exported():
    cfg = kind("schedule_free", monitor__heldout_every_tokens=320)
    seen, saved = [], []

    def measure(state):
        seen.append(state.transcoder.W_enc.detach().clone())
        return {}

    def checkpoint(state, l0=None):
        saved.append({name: tensor.clone() for name, tensor in state.tensors().items()})

    state, _ = run(cfg, measure=measure, checkpoint=checkpoint)
    final = saved[-1]
    assert torch.equal(final["parameter.W_enc"], state.transcoder.W_enc)
    assert torch.equal(final["parameter.W_enc"], seen[-1]) and len(seen) == 2
    y, z = final["optimizer/y/W_enc"], final["optimizer/z/W_enc"]
    assert not torch.equal(y, state.transcoder.W_enc)
    # the package's own way from y to the average
    parameter = torch.nn.Parameter(y.clone())
    theirs = schedulefree.AdamWScheduleFree([parameter], betas=(0.9, 0.99))
    theirs.train()
    theirs.state[parameter]["z"] = z
    theirs.eval()
    torch.testing.assert_close(parameter.detach(), state.transcoder.W_enc.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "schedule_free"])
def test_looking_at_what_is_evaluated_changes_nothing(name):
    cfg = kind(name)
    plain, _ = run(cfg)
    watched, _ = run(kind(name, monitor__heldout_every_tokens=32), measure=lambda state: {})
    for ours, theirs in zip(plain.transcoder.parameters(), watched.transcoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("adam8bit", "torchao.optim", "torchao"), ("schedule_free", "schedulefree", "schedulefree")],
)
def test_a_missing_package_is_named(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        fresh(kind(name))
    assert "train.optimizer.name" in str(caught.value) and f"pip install {package}" in str(caught.value)


def test_averaging_needs_momentum():
    with pytest.raises(ConfigError, match=r"train\.optimizer\.beta1"):
        fresh(kind("schedule_free", optimizer__beta1=0.0))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_frozen_stays_and_is_not_saved(name):
    cfg = kind(name, nonlinearity__name="topk", nonlinearity__k=3.0, nonlinearity__bandwidth=1.0)
    first = fresh(cfg)
    first.transcoder.W_enc.requires_grad_(False)
    state = make_state(cfg, first.transcoder)
    frozen = state.transcoder.W_enc.detach().clone()
    state, _ = run(cfg, state)
    assert torch.equal(state.transcoder.W_enc, frozen) and state.transcoder.W_enc.grad is None
    assert not any(name.endswith(("/W_enc", ".W_enc", "log_threshold")) for name in state.tensors())
    assert torch.isneginf(state.transcoder.log_threshold).all()
    again = make_state(cfg, fresh(cfg).transcoder.requires_grad_(False).requires_grad_(True))
    assert "parameter.W_enc" in again.tensors()


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    state = fresh(kind(name))
    steps_by(state)
    before = {key: value.clone() for key, value in state.tensors().items()}
    with pytest.raises(DivergedError, match="a finite gradient norm; found inf at step 3"):
        state.optimizer.step(1e-2, norm=math.inf, number=3)
    assert all(torch.equal(value, before[key]) for key, value in state.tensors().items())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "architecture",
    [
        ArchitectureConfig(topology="crosscoder", models=2, shared=4),
        ArchitectureConfig(decoder="target", pair_scale=True, pair_offset=True),
        ArchitectureConfig(decoder="low_rank", rank=3, skip=True),
        ArchitectureConfig(topology="molt", ranks=(4, 2)),
    ],
    ids=["crosscoder", "target", "low_rank", "molt"],
)
def test_every_form_has_its_parameters_moved(name, architecture):
    cfg = kind(name, architecture=architecture, n_features=15, init__l0=4.0, **NO_REVIVAL)
    start = {key: value.clone() for key, value in fresh(cfg).transcoder.named_parameters()}
    state, _ = run(cfg)
    for key, value in state.transcoder.named_parameters():
        assert torch.isfinite(value).all() and not torch.equal(value, start[key]), key
    assert len(state.optimizer.parameters) == len(start)


ROWS: dict[str, dict[str, Any]] = {
    "moments": {"optimizer__moments": "bf16"},
    "weights": {"optimizer__precision": "bf16"},
    "lazy": {"optimizer__lazy": True},
    "all": {"optimizer__moments": "bf16", "optimizer__precision": "bf16", "optimizer__lazy": True},
}
"""Ways of updating blocks of rows."""
SELDOM = {"nonlinearity__name": "topk", "nonlinearity__k": 1.0, **NO_REVIVAL}
"""Most features have no gradient in a step."""


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_in_blocks_of_rows_it_learns_the_task(name, way):
    cfg = kind(name, tokens=6400, **ROWS[way])
    state, rows = run(cfg)
    assert 0.92 < held_out_ev(cfg, state) < 0.999
    assert 0.92 < rows[-1]["ev"] < 0.999


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_resuming_in_blocks_of_rows_gives_the_same_bits(name, way):
    check_resuming(kind(name, **ROWS[way], **SELDOM), (1, 7, 20))


def test_moments_of_matrices_are_kept_in_16_bits():
    state = fresh(kind("adam", optimizer__moments="bf16"))
    steps_by(state)
    for key, tensor in state.tensors().items():
        if key.startswith("optimizer/exp_avg"):
            assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 3 else torch.float32), key
    exact, start = fresh(kind("adam")), fresh(kind("adam"))
    steps_by(exact)
    for parameter, name in exact.optimizer.names.items():
        ours, before = state.transcoder.get_parameter(name), start.transcoder.get_parameter(name)
        assert (ours - parameter).norm() < 0.02 * (parameter - before).norm(), name


def test_features_are_found_along_their_axis():
    state = fresh(kind("adam", optimizer__lazy=True))
    for parameter in state.optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    axes = {"W_enc": 1, "decoder.W_dec.0": 0, "decoder.W_dec.1": 0}
    for name, axis in axes.items():
        state.transcoder.get_parameter(name).grad.select(axis, 3)[..., -1] = 1.0
    state.optimizer.step(1e-2, norm=1.0, number=0)
    found = state.tensors()
    decoders = {name for name, axis in axes.items() if axis == 0}
    for name in decoders:
        assert found[f"optimizer/row_step/{name}"].nonzero().tolist() == [[3]]
    # encoders decide what fires, and move on
    assert {key.split("/")[-1] for key in found if key.startswith("optimizer/row_step")} == decoders


NAME = "decoder.W_dec.0"


@pytest.mark.parametrize("bits", ["float32", "bf16"])
def test_features_have_caught_up_where_others_look(bits):
    """Every measurement, checkpoint and outcome; the training goes on with the same bits."""
    cfg = kind("adamw", optimizer__lazy=True, optimizer__precision=bits, monitor__heldout_every_tokens=320, **SELDOM)
    seen, saved = [], []

    def measure(state):
        seen.append(state.transcoder.get_parameter(NAME).detach().clone())
        return {}

    def checkpoint(state, l0=None):
        saved.append({name: tensor.clone() for name, tensor in state.tensors().items()})

    state, _ = run(cfg, measure=measure, checkpoint=checkpoint)
    plain, _ = run(cfg)
    final, W_dec = saved[-1], state.transcoder.get_parameter(NAME)
    assert torch.equal(final[f"parameter.{NAME}"], seen[-1]) and torch.equal(W_dec, seen[-1])
    assert torch.equal(W_dec, plain.transcoder.get_parameter(NAME)) and W_dec.dtype == torch.float32
    late = final[f"optimizer/row_step/{NAME}"] < cfg.steps
    changed = (final[f"optimizer/y/{NAME}"].float() != W_dec).flatten(1).any(dim=1)
    assert changed.any() and late.any() and not late.all() and not (changed & ~late).any()


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "schedule_free"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_clipping_is_as_if_gradients_were_smaller(name, precision):
    if (name, precision) == ("schedule_free", "bf16"):
        pytest.skip("refused")
    states = [fresh(kind(name, optimizer__precision=precision)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        for ours, theirs in zip(*(state.optimizer.parameters for state in states), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator).to(ours.dtype)
            theirs.grad = ours.grad.float().mul(0.25).to(ours.dtype)
        states[0].optimizer.clip(1.0, 4.0 - 1e-6)
        for state in states:
            state.optimizer.step(1e-2, norm=4.0, number=number)
    for key, value in states[0].tensors().items():
        torch.testing.assert_close(value, states[1].tensors()[key], rtol=1e-6, atol=1e-9)
    # and the next step is not clipped unless it is said
    before = {key: value.clone() for key, value in states[0].tensors().items()}
    steps_by(states[0], seed=5, steps=1)
    fresh_copy = fresh(kind(name, optimizer__precision=precision))
    fresh_copy.optimizer.restore(before)
    steps_by(fresh_copy, seed=5, steps=1)
    assert all(torch.equal(value, fresh_copy.tensors()[key]) for key, value in states[0].optimizer.tensors().items())


def test_features_without_rows_of_their_own_cannot_be_lazy():
    options = {"n_features": 15, "init__l0": 4.0, "optimizer__lazy": True, **NO_REVIVAL}
    with pytest.raises(ConfigError, match=r"transforms of several ranks(?s:.*)train\.optimizer\.lazy"):
        fresh(kind("adam", architecture=ArchitectureConfig(topology="molt", ranks=(4, 2)), **options))


@pytest.mark.parametrize(
    ("changes", "strategy", "reason"),
    [
        ({"optimizer__lazy": True}, "fsdp", "lazy"),
        ({"optimizer__moments": "bf16"}, "fsdp", "moments bf16"),
        ({"optimizer__lazy": True}, "features", "lazy, whose numbers by row"),
        ({"optimizer__lazy": True}, "ddp", ""),
        ({"optimizer__moments": "bf16"}, "features", ""),
    ],
)
def test_ranks_cannot_divide_rows_that_have_numbers_of_their_own(changes, strategy, reason):
    found = impossible(kind("adam", **changes), strategy, 2)
    assert found.startswith(reason) if reason else not found
