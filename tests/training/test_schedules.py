import dataclasses
import math

import pytest
import torch
from tests.training.helpers import fresh, tiny

from circuitmill.training import schedules
from circuitmill.training.state import TrainState


def rates(kind: str = "linear") -> list[float]:
    options = {"peak": 2.0, "end": 100, "warmup": 20, "decay": 40.0, "kind": kind}
    return [schedules.learning_rate(tokens, **options) for tokens in range(1, 101)]


def test_linear_and_constant_meet_their_ends():
    rate = rates()
    assert rate[0] == pytest.approx(0.1)
    assert rate[19:60] == [2.0] * 41
    assert rate[79] == pytest.approx(1.0) and rate[-1] == 0.0
    assert rates("constant")[19:] == [2.0] * 81
    assert schedules.learning_rate(1, peak=2.0, end=100, warmup=0, decay=0.0) == 2.0


def test_a_cosine_falls_slowly_at_both_ends():
    rate = rates("cosine")
    assert rate[19:60] == [2.0] * 41 and rate[-1] == 0.0
    assert rate[69] == pytest.approx(1 + math.cos(math.pi / 4)) and rate[79] == pytest.approx(1.0)


def test_interpolation_meets_its_ends():
    assert [schedules.interpolate(tokens, start=0.0, final=8.0, over=4.0) for tokens in (0, 1, 4)] == [0.0, 2.0, 8.0]
    assert schedules.interpolate(0, start=3.0, final=8.0, over=0.0) == 8.0


def at(state: TrainState, step: int) -> TrainState:
    state.step = step
    return state


def with_l0(state: TrainState, l0: float) -> TrainState:
    """As if so many features per layer had been firing."""
    state.l0 = torch.full_like(state.l0, l0)
    return state


def test_a_value_of_l0_is_reached_once_and_only_after_the_warm_up():
    cfg = tiny(warmup_tokens=96, checkpoint_l0=(4.0, 8.0, 2.0))
    state = with_l0(fresh(cfg), 3.0)
    assert at(state, 2).note_l0(cfg) == []
    assert at(state, 3).note_l0(cfg) == [8.0, 4.0]
    assert state.reached == {4.0, 8.0}
    assert at(state, 4).note_l0(cfg) == []
    assert at(with_l0(state, 9.0), 5).note_l0(cfg) == []
    assert at(with_l0(state, 1.0), 6).note_l0(cfg) == [2.0]
    assert state.decay_from == 0


def test_the_learning_rate_falls_to_zero_after_stop_l0():
    cfg = tiny(tokens=3200, stop_l0=2.0)
    state = fresh(cfg)
    assert state.last_step(cfg) == 100
    at(with_l0(state, 1.0), 40).note_l0(cfg)
    assert state.decay_from == 40 * 32 and state.last_step(cfg) == 70
    rate = [at(state, step).learning_rate(cfg) / cfg.lr for step in range(38, 70)]
    assert rate[:2] == [1.0, 1.0]
    assert rate[2:] == pytest.approx([1 - n / 30 for n in range(1, 31)])
    cosine = dataclasses.replace(cfg, schedule="cosine")
    assert at(state, 54).learning_rate(cosine) == pytest.approx(cfg.lr / 2) and state.last_step(cosine) == 70


def test_a_constant_rate_ends_at_once():
    cfg = tiny(tokens=3200, stop_l0=2.0, schedule="constant")
    state = at(with_l0(fresh(cfg), 1.0), 40)
    state.note_l0(cfg)
    assert state.last_step(cfg) == 40


def test_stop_l0_changes_nothing_once_the_rate_is_falling():
    cfg = tiny(tokens=3200, stop_l0=2.0)
    state = fresh(cfg)
    before = [at(state, step).learning_rate(cfg) for step in range(80, 100)]
    at(with_l0(state, 1.0), 80).note_l0(cfg)
    assert state.last_step(cfg) == 100
    assert [at(state, step).learning_rate(cfg) for step in range(80, 100)] == before
