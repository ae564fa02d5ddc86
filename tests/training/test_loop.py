import dataclasses
import time

import pytest
import torch
from tests.training.helpers import ONE, Memory, batches, fresh, run, tiny
from tests.training.kinds import check_resuming, run_to_end, same_state

from circuitmill.config.train import TermConfig
from circuitmill.errors import ConfigError, DivergedError, InterruptedRun, ShapeError
from circuitmill.training import loop, objective
from circuitmill.training.loop import Ended
from circuitmill.training.state import start


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
        "peak_memory_bytes", "sparse_layers",
    }  # fmt: skip
    assert len(last["ev_per_layer"]) == len(last["l0"]) == 2
    assert last["coefficients"] == {name: term.coefficient for name, term in cfg.loss.items()}
    assert last["lr"] == 0.0
    assert 2**26 < rows[0]["peak_memory_bytes"] <= last["peak_memory_bytes"]


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
    assert min(check_resuming(tiny(), (step,))) > 0


def test_a_finished_training_can_be_resumed_to_do_nothing():
    cfg = tiny()
    finished, _ = run(cfg)
    again = fresh(cfg)
    again.restore(finished.tensors())
    again, rows, ended = run_to_end(cfg, again)
    same_state(again, finished)
    assert rows == [] and ended == Ended(20, "budget")


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


def test_the_change_of_products_is_logged_and_changes_nothing(caplog, monkeypatch):
    monkeypatch.setattr(objective, "WORTHWHILE", {"cpu": 0.3})
    cfg = tiny(loss__tanh_sparsity=TermConfig(3.0, 1.0, scale=1.0), tokens=1280)
    with caplog.at_level("INFO", logger="circuitmill.training.loop"):
        _, rows = run(cfg)
    said = [record.getMessage() for record in caplog.records]
    assert "layers work with active features alone" in said[0] and 1 < len(said) < 40
    assert {0} < {row["sparse_layers"] for row in rows} <= {0, 1, 2}
    for products, layers in (("dense", 0), ("sparse", 2)):
        _, same = run(dataclasses.replace(cfg, products=products))
        assert {row["sparse_layers"] for row in same} == {layers}
        for key in ("loss", "ev", "l0"):
            assert same[-1][key] == pytest.approx(rows[-1][key], rel=1e-4), key


def test_starting_values_follow_the_configuration():
    cfg = tiny(init__encoder_bias="zero", init__decoder_bias="zero")
    assert not fresh(cfg).transcoder.b_enc.any() and not fresh(cfg).transcoder.b_dec.any()
    with batches(tiny()) as data:
        x, y = data.get(0)
        state = start(tiny(), x, y)
    firing = (state.transcoder.encode(x) > 0).double().sum(dim=2).mean(dim=0)
    assert firing.tolist() == pytest.approx([4.0, 4.0])
    torch.testing.assert_close(state.transcoder.b_dec.detach(), y.mean(dim=0))


@pytest.mark.parametrize("parts", [2, 4, 32])
@pytest.mark.parametrize("name", ["jumprelu", "topk", "token_topk"])
def test_micro_batches_give_what_the_whole_batch_gives(parts, name):
    k = 0.0 if name == "jumprelu" else 4.0
    cfg = tiny(nonlinearity__name=name, nonlinearity__k=k, tokens=320, monitor__log_tokens=32)
    (whole, expected), (split, found) = (
        run(dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, micro_batches=count)))
        for count in (1, parts)
    )
    first, same = expected[0], found[0]
    for key in ("loss", "ev", "grad_norm", *(f"loss_{term}" for term in cfg.loss)):
        assert same[key] == pytest.approx(first[key], rel=1e-6, abs=1e-6), key
    assert same["l0"] == first["l0"] and same["ev_per_layer"] == pytest.approx(first["ev_per_layer"], abs=1e-6)
    assert torch.equal(split.idle, whole.idle)
    torch.testing.assert_close(split.density, whole.density, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split.least, whole.least, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(split.transcoder.parameters(), whole.transcoder.parameters(), strict=True):
        if torch.isfinite(theirs).all():
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("parts", [2, 4])
def test_gradients_of_micro_batches_add_up(parts, monkeypatch):
    """With some features dead, so that every term takes part."""
    gradients = {}

    def keep(lr, *, norm, number):
        gradients[count] = [p.grad.clone() for p in state.optimizer.parameters if p.grad is not None]

    for count in (1, parts):
        cfg = tiny(optimizer__micro_batches=count, optimizer__clip_norm=1e9)
        state = fresh(cfg)
        state.idle[:, ::3] = 10_000
        state.n_dead = int(state.dead(cfg.dead_tokens).sum())
        monkeypatch.setattr(state.optimizer, "step", keep)
        with batches(cfg) as data:
            result, _ = loop._step(cfg, state, data.get(0), ONE, asked=False)
        assert result.terms["auxiliary"] > 0
    for ours, theirs in zip(gradients[parts], gradients[1], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_micro_batches_must_divide_a_ranks_batch():
    with pytest.raises(ConfigError, match=r"where: train\.optimizer\.micro_batches"):
        run(tiny(optimizer__micro_batches=5))


def test_resuming_with_micro_batches_gives_the_same_bits():
    check_resuming(tiny(optimizer__micro_batches=4), (7,))


SPARSER = {"tokens": 6400, "loss__tanh_sparsity": TermConfig(3.0, ramp_share=0.5, scale=1.0)}


def running_l0(state) -> float:
    return state.density.sum().item() / 2


def test_a_checkpoint_is_kept_for_each_value_of_l0_once():
    kept, by_step = {}, {}

    def checkpoint(state, l0=None):
        by_step[state.step] = running_l0(state)
        if l0 is not None:
            assert l0 not in kept and l0 in state.tensors()["reached"].tolist()
            kept[l0] = state.step

    cfg = tiny(**SPARSER, checkpoint_tokens=32, checkpoint_l0=(3.0, 3.5, 0.01))
    state, _ = run(cfg, checkpoint=checkpoint)
    assert set(kept) == state.reached == {3.0, 3.5}
    assert 2 <= kept[3.5] < kept[3.0]
    for value, step in kept.items():
        assert by_step[step] < value <= by_step[step - 1]


def test_a_resumed_training_keeps_each_value_once_too():
    cfg = tiny(**SPARSER, checkpoint_tokens=32, checkpoint_l0=(3.0, 3.5))
    saved, kept = {}, {}

    def checkpoint(state, l0=None):
        saved[state.step] = {name: tensor.clone() for name, tensor in state.tensors().items()}
        if l0 is not None:
            kept[l0] = state.step

    run(cfg, checkpoint=checkpoint)
    for step in (kept[3.5] - 1, kept[3.5], kept[3.0]):
        before = dict(kept)
        kept.clear()
        state = fresh(cfg)
        state.restore(saved[step])
        run(cfg, state, checkpoint=checkpoint)
        assert kept == {value: at for value, at in before.items() if at > step}
        kept = before


def test_stop_l0_ends_the_training_with_a_rate_of_zero():
    saved = {}
    cfg = tiny(**SPARSER, checkpoint_tokens=32, stop_l0=3.5, monitor__log_tokens=32, decay_share=0.2)
    state, rows, ended = run_to_end(
        cfg,
        checkpoint=lambda state, l0=None: saved.update(
            {state.step: {k: v.clone() for k, v in state.tensors().items()}}
        ),
    )
    begun = state.decay_from // 32
    assert begun > 2 and ended == Ended(begun + 40, "stop_l0")
    assert state.step == begun + 40 == rows[-1]["step"] < cfg.steps
    rate = [row["lr"] for row in rows]
    assert rate[begun - 1] == cfg.lr and rate[-1] == 0.0
    assert rate[begun:] == sorted(rate[begun:], reverse=True) and rate[begun + 19] == pytest.approx(cfg.lr / 2)
    assert max(saved) == state.step
    for step in (begun - 1, begun, begun + 17, begun + 40):
        resumed = fresh(cfg)
        resumed.restore(saved[step])
        resumed, _, again = run_to_end(cfg, resumed)
        same_state(resumed, state)
        assert again == ended


def test_figures_are_measured_every_so_many_tokens_and_at_the_end():
    cfg = tiny(monitor__heldout_every_tokens=160, monitor__log_tokens=128)
    seen = []

    def measure(state):
        seen.append(state.step)
        return {"heldout_ev": 0.5, "dead": 0.25}

    _, rows = run(cfg, measure=measure)
    assert seen == [5, 10, 15, 20]
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12, 15, 16, 20]
    assert [row["step"] for row in rows if row.get("heldout_ev") == 0.5] == seen
    assert all(row["dead"] == 0.25 for row in rows if row["step"] in seen)


def test_measuring_does_not_count_as_training_time(monkeypatch):
    cfg = tiny(monitor__heldout_every_tokens=320)
    _, rows = run(cfg, measure=lambda state: time.sleep(1.0) or {})
    after = next(row for row in rows if row["step"] == 12)
    assert after["tokens_per_second"] > 64
