"""Whole trainings on a GPU: every optimizer with every precision, what a checkpoint holds, profile and memory."""

import json

import pytest
import torch
from tests.training.helpers import Memory, scaling, tiny
from tests.training.kinds import KINDS, kind, same_state

from circuitmill.core.muon import orthogonalised
from circuitmill.core.rounding import generator_at, round_stochastically
from circuitmill.training.batches import Batches
from circuitmill.training.loop import train
from circuitmill.training.parallel.layout import alone
from circuitmill.training.state import TrainState, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")


def data(cfg) -> Batches:
    return Batches(Memory(cfg.batch_tokens), scaling(), device=DEVICE)


def beginning(cfg) -> TrainState:
    with data(cfg) as batches:
        return start(cfg, *batches.get(0))


def run(cfg, state=None, **hooks):
    rows: list = []
    state = state or beginning(cfg)
    defaults = {"log": rows.append, "checkpoint": lambda state, l0=None: None, "trace": None}
    with data(cfg) as batches:
        train(
            cfg,
            state,
            batches,
            layout=alone(cfg.n_features),
            advance=lambda tokens: None,
            stop=lambda: False,
            **(defaults | hooks),
        )
    return state, rows


POSSIBLE = [
    (name, bits)
    for name in KINDS
    for bits in ("float32", "bf16_autocast", "bf16", "fp16")
    if (name, bits) != ("schedule_free", "bf16")
]


@pytest.mark.parametrize(("name", "bits"), POSSIBLE)
def test_each_kind_learns_the_task_with_each_precision(name, bits):
    cfg = kind(name, tokens=6400, optimizer__precision=bits)
    state, rows = run(cfg)
    assert 0.92 < rows[-1]["ev"] < 0.999
    assert {parameter.dtype for parameter in state.transcoder.parameters()} == {torch.float32}
    assert (bits == "fp16") == ("loss_scale" in rows[-1])


@pytest.mark.parametrize(("name", "bits"), POSSIBLE)
def test_a_state_comes_back_bit_by_bit(name, bits):
    cfg = kind(name, optimizer__precision=bits)
    saved = []

    def checkpoint(state, l0=None):
        if not saved:
            saved.append({key: tensor.clone() for key, tensor in state.tensors().items()})

    run(cfg, checkpoint=checkpoint)
    restored = beginning(cfg)
    restored.restore(saved[0])
    again = restored.tensors()
    assert set(again) == set(saved[0])
    for key, tensor in saved[0].items():
        assert tensor.dtype == again[key].dtype and torch.equal(tensor, again[key]), key
    resumed, rows = run(cfg, restored)
    assert resumed.step == cfg.steps and rows[-1]["ev"] > 0.0


def test_the_same_configuration_gives_the_same_rounding():
    cfg = tiny(optimizer__precision="bf16")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        same_state(run(cfg)[0], run(cfg)[0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_rounding_is_unbiased():
    values = torch.tensor([1.001, -3.14159, 2e-5], device=DEVICE)
    generator = generator_at("0", 0, DEVICE)
    draws = torch.stack([round_stochastically(values, generator) for _ in range(20_000)]).double()
    spread = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - values.double()).abs() < 5 * spread).all()


def test_orthogonal_directions_are_those_of_the_cpu():
    matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthogonalised(matrix.to(DEVICE)).float().cpu(), orthogonalised(matrix), rtol=0.05, atol=0.02
    )


def test_bfloat16_holds_less_memory():
    held = {}
    for bits in ("float32", "bf16"):
        cfg = tiny(n_features=100_000, init__encoder_bias="zero", optimizer__precision=bits)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        state = beginning(cfg)
        for parameter in state.optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step(1e-3, norm=1.0, number=0)
        held[bits] = torch.cuda.memory_allocated() - before
        del state
    # of a matrix 2 + 8 bytes per number in place of 4 + 8
    assert held["bf16"] < 0.9 * held["float32"]


def test_memory_is_that_of_tensors_and_a_profile_sees_the_gpu(tmp_path):
    path = tmp_path / "rank-0.json"
    _, rows = run(tiny(monitor__profile_steps=2), trace=path)
    assert 2**12 < rows[0]["peak_memory_bytes"] <= rows[-1]["peak_memory_bytes"] <= torch.cuda.max_memory_allocated()
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
