"""The arithmetic of benchmarks: operations against torch's counter, differences between trainings."""

import argparse
import json

import pytest
import torch
from benchmarks import step_floor, train_step
from benchmarks.convergence import configured, difference, shorter
from benchmarks.step_floor import Clock, Shape
from torch.utils.flop_counter import FlopCounterMode

from circuitmill.errors import ConfigError

SMALL = Shape(3, 8, 64, 128)
KINDS = ("jumprelu", "topk", "batch_topk")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(train_step.SHAPES, "M", SMALL)
    monkeypatch.setitem(step_floor.MOVED, "cpu", 4096)
    own = {"device": "cpu", "threads": torch.get_num_threads(), "precision": "float32", "moments": "float32"}
    return argparse.Namespace(way=["dense", "sparse"], rounds=2, lazy=False, near=0.5, **own)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_step(kind: str, options: argparse.Namespace):
    case, clock = train_step.Case("M", kind, 4.0, options), Clock(torch.device("cpu"))
    for way in train_step.WAYS:
        cfg = train_step.configured(case, way)
        state, x, y = train_step.started(case, cfg)
        with train_step.encoders_timed(clock) as places, FlopCounterMode(display=False) as counter:
            train_step.step(cfg, state, x, y, clock)
        work = train_step.least_work(case, places)
        # JumpReLU's term of pre-activations multiplies summed inputs with encoders, once for all tokens
        once = 4 * SMALL.n_layers * SMALL.n_features * SMALL.d_model if kind == "jumprelu" else 0
        assert work["dense_flop"] <= counter.get_total_flops() <= work["dense_flop"] + once
        assert bool(places) == (way == "sparse")


def test_jumprelu_fires_as_asked_and_its_kernel_covers_as_asked(options: argparse.Namespace):
    case, clock = train_step.Case("M", "jumprelu", 4.0, options), Clock(torch.device("cpu"))
    cfg = train_step.configured(case, "sparse")
    state, x, y = train_step.started(case, cfg)
    with train_step.encoders_timed(clock) as places:
        result = train_step.step(cfg, state, x, y, clock)
    assert result.l0.tolist() == [4.0] * SMALL.n_layers
    covered = sum(map(len, places)) / SMALL.batch_tokens / SMALL.n_layers
    assert covered == pytest.approx(6.0, rel=0.15)


def test_lines_and_refusal(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    case = train_step.Case("M", "topk", 4.0, options)
    monkeypatch.setattr(train_step, "peak_alone", lambda case, way: 1)
    train_step.compare(case)
    dense, sparse, both = map(json.loads, capsys.readouterr().out.splitlines())
    assert (dense["way"], dense["places_per_token"], sparse["places_per_token"]) == ("dense", 64, 4.0)
    assert sparse["dense_flop"] + sparse["sparse_flop"] < dense["dense_flop"]
    assert set(dense["seconds"]) == {"encode", "decode_loss", "backward", "norm_clip", "update"}
    low, high = sorted(both["speedup"])[::2]
    assert low <= both["speedup"][0] <= high and "passes" not in both
    monkeypatch.setattr(train_step, "memory_of", lambda device: 1000)
    with pytest.raises(SystemExit, match="smaller --shape"):
        train_step.compare(case)


def test_products_at_all_places_are_the_dense_ones():
    everything = [SMALL.batch_tokens * SMALL.n_features] * SMALL.n_layers
    finding, rest = step_floor.sparse_flop(SMALL, everything)
    assert rest == step_floor.dense_flop(SMALL) > finding


def test_floor_is_the_sum_of_its_parts():
    yardstick = {"products": step_floor.dense_flop(SMALL) / 1e9, "memory": 2 * step_floor.MOVED["cpu"] / 1e6}
    work = {"dense_flop": 2e9, "sparse_flop": 5e8, "table_bytes": 3e6, "update_bytes": 4e6}
    assert step_floor.floor(SMALL, torch.device("cpu"), work, yardstick) == pytest.approx(2 + 3 + 4)
    assert step_floor.update_bytes(SMALL, 4, 4) == 36 * 64 * (3 * 8 + 8 * (3 + 2 + 1))


def test_differences_are_between_trainings_of_the_same_seed():
    base = [{"loss": 1.0, "ev": 0.5, "l0": 4.0}, {"loss": 3.0, "ev": 0.5, "l0": 4.0}]
    option = [{"loss": 2.0, "ev": 0.5, "l0": 4.0}, {"loss": 4.0, "ev": 0.5, "l0": 5.0}]
    found = difference(base, option)
    assert found["loss"]["difference"] == 1.0
    assert found["loss"]["difference_in_sd"] == pytest.approx(2**-0.5, abs=0.01)
    # no deviation to measure by
    assert found["ev"]["difference_in_sd"] is None


def test_equal_seconds_are_whole_batches():
    assert shorter(4096, seconds=4.0, given=3.5, batch_tokens=1024) == 3072
    assert shorter(4096, seconds=4.0, given=0.1, batch_tokens=1024) == 1024


def test_options_reach_the_configuration_or_are_refused():
    cfg = configured("batch_topk", "optimizer.moments=bf16,products=sparse", 20_480, 3)
    assert (cfg.optimizer.moments, cfg.products, cfg.seed, cfg.nonlinearity.name) == ("bf16", "sparse", 3, "batch_topk")
    for wrong in ("nonlinearity.band_stride=4", "optimizer.moment=bf16"):
        with pytest.raises(ConfigError):
            configured("batch_topk", wrong, 20_480, 0)
