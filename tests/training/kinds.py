"""Every optimizer on the small task, and states compared bit by bit."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.training.helpers import batches, beginning, fresh, run, tiny

from circuitmill.config.train import TrainConfig
from circuitmill.training.loop import Ended, train
from circuitmill.training.parallel.layout import alone
from circuitmill.training.state import TrainState

KINDS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer__weight_decay": 0.01},
    "adam8bit": {"n_features": 512, "init__l0": 32.0, "lr": 2e-3},  # fewer features would leave no moment in 8 bits
    "muon": {"optimizer__weight_decay": 0.01},
    "schedule_free": {"schedule": "constant", "lr": 3e-2},
}


def kind(name: str, **changes: Any) -> TrainConfig:
    """The small task with an optimizer; 8 bits only where torchao is, which slows every import of transformers."""
    if name == "adam8bit":
        pytest.importorskip("torchao")
    return tiny(**({"optimizer__name": name} | KINDS[name] | changes))


def same_state(one: TrainState, other: TrainState) -> None:
    ours, theirs = one.tensors(), other.tensors()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def check_resuming(cfg: TrainConfig, steps: tuple[int, ...], **hooks: Any) -> list[int]:
    """A training resumed from each of these steps ends as the unbroken one; returns the steps of their rows."""
    saved: dict[int, dict[str, torch.Tensor]] = {}

    def keep(state: TrainState, l0: float | None = None) -> None:
        if state.step in steps:
            saved[state.step] = {name: tensor.clone() for name, tensor in state.tensors().items()}

    every = dataclasses.replace(cfg, checkpoint_tokens=cfg.batch_tokens)
    unbroken, _ = run(every, checkpoint=keep, **hooks)
    seen: list[int] = []
    for step in steps:
        before = {name: tensor.clone() for name, tensor in saved[step].items()}
        resumed = fresh(cfg)
        resumed.restore(saved[step])
        torch.manual_seed(99)
        resumed.restore(saved[step])
        assert resumed.step == step
        resumed, rows = run(cfg, resumed, **hooks)
        same_state(resumed, unbroken)
        for name, tensor in saved[step].items():
            assert torch.equal(tensor, before[name]), f"{name} was changed by the training that took it over"
        seen += [row["step"] - step for row in rows]
    return seen


def run_to_end(cfg: TrainConfig, state: TrainState | None = None, **hooks: Any) -> tuple[TrainState, list, Ended]:
    """As `helpers.run`, with how it ended."""
    rows: list = []
    with batches(cfg) as data:
        state = state or beginning(cfg, data)
        defaults = {"log": rows.append, "checkpoint": lambda state, l0=None: None}
        ended = train(
            cfg,
            state,
            data,
            layout=alone(cfg.n_features),
            advance=lambda tokens: None,
            stop=lambda: False,
            **(defaults | hooks),
        )
    return state, rows, ended


def held_out_ev(cfg: TrainConfig, state: TrainState) -> float:
    """Explained variance on tokens that were not trained on, with the parameters as they are."""
    with batches(cfg) as data:
        x, y = data.get(10_000)
    with torch.no_grad():
        y_hat = state.transcoder(x)
    return float(1 - (y - y_hat).square().sum() / (y - y.mean(dim=0)).square().sum())
