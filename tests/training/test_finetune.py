"""Trainings that begin with a finished transcoder."""

import dataclasses

import pytest
import torch
from tests.training import helpers
from tests.training.helpers import D_MODEL, N_LAYERS, Memory, batches, run, tiny

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import NonlinearityConfig
from circuitmill.core.adapters import Adapted, merged
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.training.finetune import state_from_base
from circuitmill.training.objective import Moment, evaluate_batch

SOURCE_TIED = ArchitectureConfig(decoder="source")
TRAINED = {"decoder.change.Q", "decoder.change.P"}


class Shifted(Memory):
    """Another model: its outputs are a related function of its inputs, of another size and place."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = self.mix + 0.5 * torch.randn(self.mix.shape, generator=torch.Generator().manual_seed(10))

    def pair(self, index):
        x, y = super().pair(index)
        return x + 0.3, 1.3 * y + 0.2


def finished(cfg):
    """A base in raw units, as a store gives it."""
    state, _ = run(cfg)
    return fold(state.transcoder, helpers.scaling()).requires_grad_(False)


@pytest.fixture(scope="module")
def base():
    return finished(tiny(tokens=3200))


def adapter_config(**changes):
    return tiny(**({"base": "other", "adapter_rank": 2} | changes))


def moment(state):
    return Moment(100, state.dead(10**9), state.density)


def other_scaling():
    generator = torch.Generator().manual_seed(4)
    scale, center = (torch.rand(2, N_LAYERS, D_MODEL, generator=generator) for _ in range(2))
    return Scaling(*(0.3 + scale), *center)


@pytest.mark.parametrize("changes", [{}, {"adapter_rank": 0}], ids=["adapter", "all"])
def test_the_training_begins_as_the_base(base, changes):
    scaling, raw = other_scaling(), Memory().pair(0)[0]
    state = state_from_base(adapter_config(**changes), base, scaling)
    with torch.no_grad():
        found = scaling.raw_outputs(state.transcoder(scaling.inputs(raw)))
        torch.testing.assert_close(found, base(raw), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(state.transcoder.encode(scaling.inputs(raw)), base.encode(raw), rtol=1e-5, atol=1e-4)
    assert state.step == 0 and not state.idle.any()


def test_without_an_adapter_everything_is_trained(base):
    cfg = adapter_config(adapter_rank=0)
    state = state_from_base(cfg, base, helpers.scaling())
    before = {name: parameter.detach().clone() for name, parameter in state.transcoder.named_parameters()}
    torch.testing.assert_close(before["log_threshold"], base.log_threshold)
    run(cfg, state, source=Shifted())
    for name, parameter in state.transcoder.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert not any(parameter.requires_grad for parameter in base.parameters()), "the base is left alone"


@pytest.mark.parametrize(
    "architecture",
    [
        ArchitectureConfig(),
        ArchitectureConfig(decoder="target"),
        SOURCE_TIED,
        ArchitectureConfig(decoder="low_rank", rank=3),
    ],
    ids=lambda form: form.decoder,
)
def test_an_adapter_lowers_the_loss_and_changes_nothing_else(architecture):
    base = finished(tiny(tokens=3200, architecture=architecture))
    cfg = adapter_config(tokens=6400, architecture=architecture)
    state = state_from_base(cfg, base, helpers.scaling())
    before = {name: parameter.detach().clone() for name, parameter in state.transcoder.named_parameters()}
    with batches(cfg, source=Shifted()) as data:
        pair = data.get(1000)

    def loss():
        with torch.no_grad():
            return evaluate_batch(state.transcoder, *pair, cfg, moment(state)).terms["reconstruction"].item()

    start = loss()
    run(cfg, state, source=Shifted())
    assert loss() < 0.8 * start
    changed = {name for name, value in state.transcoder.named_parameters() if not torch.equal(value, before[name])}
    assert changed == TRAINED
    plain = fold(merged(state.transcoder), helpers.scaling())
    assert not isinstance(plain.decoder, Adapted)
    with torch.no_grad():
        found = helpers.scaling().outputs(plain(pair[0] / helpers.scaling().input_scale))
        torch.testing.assert_close(found, state.transcoder(pair[0]), rtol=1e-4, atol=1e-4)


def test_an_adapter_continues_from_a_checkpoint_with_the_same_bits(base):
    cfg = adapter_config(checkpoint_tokens=7 * 32)
    saved = []

    def keep(state, l0=None):
        saved.append({name: tensor.clone() for name, tensor in state.tensors().items()})

    whole, _ = run(cfg, state_from_base(cfg, base, helpers.scaling()), source=Shifted(), checkpoint=keep)
    resumed = state_from_base(cfg, base, helpers.scaling())
    resumed.restore(saved[0])
    assert 0 < resumed.step < cfg.steps
    resumed, _ = run(cfg, resumed, source=Shifted())
    for name, parameter in whole.transcoder.named_parameters():
        assert torch.equal(parameter, resumed.transcoder.get_parameter(name)), name


def test_the_seed_decides_the_start(base):
    first, again, other = (
        state_from_base(adapter_config(seed=seed), base, helpers.scaling()).transcoder.decoder.change.Q
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prefixes_may_differ(base):
    form = ArchitectureConfig(prefixes=(4, 16))
    state = state_from_base(adapter_config(architecture=form), base, helpers.scaling())
    assert state.transcoder.architecture.prefixes == (4, 16)
    _, rows = run(adapter_config(architecture=form), state, source=Shifted())
    assert rows[-1]["loss_reconstruction"] > 0


def test_a_top_k_kind_ignores_the_thresholds_and_keeps_them(base):
    cfg = adapter_config(nonlinearity=NonlinearityConfig("batch_topk", k=3.0))
    state = state_from_base(cfg, base, helpers.scaling())
    run(cfg, state, source=Shifted())
    with batches(cfg, source=Shifted()) as data:
        result = evaluate_batch(state.transcoder, *data.get(0), cfg, moment(state))
    assert result.l0.tolist() == [3.0, 3.0]
    torch.testing.assert_close(state.transcoder.threshold, base.threshold)


def test_thresholds_that_do_not_fit_the_nonlinearity_are_refused(base):
    with pytest.raises(ConfigError, match=r"thresholds above zero; found relu\n  where: train.nonlinearity.name"):
        state_from_base(adapter_config(nonlinearity=NonlinearityConfig("relu")), base, helpers.scaling())
    rectified = finished(tiny(nonlinearity=NonlinearityConfig("relu")))
    assert not rectified.threshold.any()
    with pytest.raises(ConfigError, match=r"32 features have a threshold of zero; found jumprelu"):
        state_from_base(adapter_config(adapter_rank=0), rectified, helpers.scaling())
    for changes in ({}, {"adapter_rank": 0, "nonlinearity": NonlinearityConfig("relu")}):
        state = state_from_base(adapter_config(**changes), rectified, helpers.scaling())
        assert not state.transcoder.log_threshold.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_features": 8}, r"as many features as the base has \(16\); found 8\n  where: train.n_features"),
        ({"architecture": ArchitectureConfig(skip=True)}, r"False, as the base has; found True\n.*architecture.skip"),
        ({"architecture": SOURCE_TIED}, r"'untied', as the base has; found 'source'\n.*architecture.decoder"),
    ],
    ids=["n_features", "skip", "decoder"],
)
def test_another_architecture_than_the_base_has_is_refused(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        state_from_base(adapter_config(**changes), base, helpers.scaling())


def test_activations_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="a base of 2 layers and width 6, as the activations have; found 3 layers"):
        state_from_base(adapter_config(), Transcoder(3, 16, D_MODEL), helpers.scaling())


def test_an_adapter_without_a_base_is_refused():
    with pytest.raises(ConfigError, match="0 without a base"):
        dataclasses.replace(adapter_config(), base="")
