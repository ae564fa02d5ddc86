import dataclasses

import pytest
import torch
from tests.training.helpers import Memory, batches, fresh, run, tiny

from circuitmill.config.train import TermConfig
from circuitmill.errors import DivergedError, InterruptedRun, ShapeError
from circuitmill.training import schedules
from circuitmill.training.state import start


def same_state(one, other):
    ours, theirs = one.tensors(), other.tensors()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_fit_improves_and_everything_is_reported():
    cfg = tiny(tokens=6400)
    state, rows = run(cfg)
    assert state.step == 200
    assert [row["tokens"] for row in rows] == list(range(64, 6401, 64))
    assert rows[-1]["ev"] > max(0.7, rows[0]["ev"] + 0.2)
    last = rows[-1]
    assert set(last) == {
        "step", "tokens", "loss", "loss_reconstruction", "loss_tanh_sparsity", "loss_pre_activation", "loss_auxiliary",
        "ev", "ev_per_layer", "l0", "dead", "lr", "coefficients", "grad_norm", "tokens_per_second", "data_wait_share",
    }  # fmt: skip
    assert len(last["ev_per_layer"]) == len(last["l0"]) == 2
    assert last["coefficients"] == {name: term.coefficient for name, term in cfg.loss.items()}
    assert last["lr"] == 0.0


def test_sparsity_costs_active_features():
    weak, strong = (
        run(tiny(tokens=3200, loss__tanh_sparsity=TermConfig(value, 1.0, scale=1.0)))[1][-1] for value in (0.01, 3.0)
    )
    assert sum(strong["l0"]) < sum(weak["l0"])


def test_the_same_configuration_gives_the_same_bits():
    same_state(run(tiny())[0], run(tiny())[0])
    assert not torch.equal(run(tiny(seed=1))[0].transcoder.W_enc, run(tiny())[0].transcoder.W_enc)


@pytest.mark.parametrize("step", [1, 7, 19])
def test_resuming_from_any_step_gives_the_same_bits(step):
    cfg = tiny()
    saved = {}
    unbroken, _ = run(
        dataclasses.replace(cfg, checkpoint_tokens=cfg.batch_tokens),
        checkpoint=lambda state: saved.update({state.step: {k: v.clone() for k, v in state.tensors().items()}}),
    )
    resumed = fresh(cfg)
    resumed.restore(saved[step])
    torch.manual_seed(99)
    resumed.restore(saved[step])
    assert resumed.step == step
    resumed, rows = run(cfg, resumed)
    same_state(resumed, unbroken)
    assert all(row["step"] > step for row in rows)


def test_a_checkpoint_of_another_shape_is_refused():
    saved = fresh(tiny(n_features=8)).tensors()
    with pytest.raises(ShapeError, match=r"W_enc of shape \(2, 16, 6\); found \(2, 8, 6\)"):
        fresh(tiny()).restore(saved)


def test_checkpoints_come_every_so_many_tokens_and_at_the_end():
    steps = []
    run(tiny(checkpoint_tokens=200), checkpoint=lambda state: steps.append(state.step))
    assert steps == [7, 13, 19, 20]


def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint():
    asked, saved = iter([False, False, True]), []
    with pytest.raises(InterruptedRun, match="a request to stop after step 3"):
        run(tiny(), stop=lambda: next(asked), checkpoint=lambda state: saved.append(state.step))
    assert saved == [3]


class Poisoned(Memory):
    def pair(self, index):
        x, y = super().pair(index)
        return x, y * float("nan") if index == 5 else y


def test_a_loss_that_is_not_finite_stops_before_the_update():
    cfg = tiny(checkpoint_tokens=32)
    state, saved = fresh(cfg), []
    with pytest.raises(DivergedError, match=r"a finite reconstruction term of the loss; found nan at step 5"):
        run(cfg, state, source=Poisoned(), checkpoint=lambda state: saved.append(state.tensors()))
    assert state.step == 5
    assert torch.equal(saved[-1]["parameter.W_enc"], state.transcoder.W_enc)
    assert all(torch.isfinite(parameter).all() for parameter in state.transcoder.parameters())


def test_dead_counters_are_in_tokens_and_reset_by_firing():
    cfg = tiny(loss__pre_activation=TermConfig(0.0), loss__auxiliary=TermConfig(0.0, k=1))
    state = fresh(cfg)
    with torch.no_grad():
        state.transcoder.b_enc[0, 3] = -1e4
    state, rows = run(cfg, state)
    assert state.idle[0, 3] == cfg.tokens
    assert state.idle.max() <= cfg.tokens and (state.idle == 0).any()
    assert rows[-1]["dead"] >= 1 / 32
    assert state.dead(cfg.tokens)[0, 3] and not state.dead(cfg.tokens + 1)[0, 3]


def test_dead_features_come_back():
    def ending(**changes):
        cfg = tiny(tokens=9600, lr=2e-2, dead_tokens=1600, **changes)
        state = fresh(cfg)
        with torch.no_grad():
            state.transcoder.b_enc[:, :8] -= 2.0
        return run(cfg, state)[1][-1]["dead"]

    off = ending(loss__pre_activation=TermConfig(0.0), loss__auxiliary=TermConfig(0.0, k=1))
    assert off >= 0.5
    assert ending() <= off / 2


def test_clipping_bounds_the_step_but_not_the_reported_norm():
    _, rows = run(tiny(optimizer__clip_norm=1e-6))
    assert rows[0]["grad_norm"] > 1e-3


def test_starting_values_follow_the_configuration():
    cfg = tiny(init__encoder_bias="zero", init__decoder_bias="zero")
    assert not fresh(cfg).transcoder.b_enc.any() and not fresh(cfg).transcoder.b_dec.any()
    with batches(tiny()) as data:
        x, y = data.get(0)
        state = start(tiny(), x, y)
    firing = (state.transcoder.encode(x) > 0).double().sum(dim=2).mean(dim=0)
    assert firing.tolist() == pytest.approx([4.0, 4.0])
    torch.testing.assert_close(state.transcoder.b_dec.detach(), y.mean(dim=0))


def test_schedules_meet_their_ends():
    rate = [
        schedules.learning_rate(tokens, peak=2.0, total=100, warmup=20, decay_share=0.4) for tokens in range(1, 101)
    ]
    assert rate[0] == pytest.approx(0.1)
    assert rate[19:60] == [2.0] * 41
    assert rate[79] == pytest.approx(1.0) and rate[-1] == 0.0
    assert schedules.learning_rate(1, peak=2.0, total=100, warmup=0, decay_share=0.0) == 2.0
    assert [schedules.interpolate(tokens, start=0.0, final=8.0, over=4.0) for tokens in (0, 1, 4)] == [0.0, 2.0, 8.0]
    assert schedules.interpolate(0, start=3.0, final=8.0, over=0.0) == 8.0
