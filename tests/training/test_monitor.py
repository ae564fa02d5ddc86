import json
import os
import signal

import pytest

from circuitmill.stores.metrics import read_metrics
from circuitmill.training.interrupt import StopRequest
from circuitmill.training.monitor import MetricsFile


def test_rows_survive_and_later_ones_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resume_step=0)
    for step in (10, 20, 30):
        first.log({"step": step, "ev": 0.5, "l0": [1.0, float("nan")]})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 40, "ev"')
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
    again = MetricsFile(path, resume_step=20)
    again.log({"step": 30, "ev": float("inf")})
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["l0"] == [1.0, None] and rows[2]["ev"] is None


def test_groups_and_lists_come_back_and_what_is_not_finite_in_them_is_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    row = {"step": 1, "coefficients": {"kl": 0.5}, "h": {"edges": [0, 1], "counts": [[3], [4]]}}
    file.log(row | {"bad": {"p5": [float("nan"), 1.0], "p50": float("inf")}})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [row | {"bad": {"p5": [None, 1.0], "p50": None}}]


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    MetricsFile(path, resume_step=0).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_set_a_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.received == number
    assert signal.getsignal(number) == before


def test_what_was_measured_lies_apart_and_comes_back_with_its_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "ev": 0.5, "tokens_per_second": None}, {"step": 2, "ev": 0.6, "tokens_per_second": 8.0}]
    file = MetricsFile(path, resume_step=0)
    for row in rows:
        file.log(row | {"peak_memory_bytes": 7})
    file.close()
    assert path.read_text() == '{"step": 1, "ev": 0.5}\n{"step": 2, "ev": 0.6}\n'
    assert read_metrics(path) == [row | {"peak_memory_bytes": 7} for row in rows]
    MetricsFile(path, resume_step=1).close()
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert (tmp_path / "throughput.jsonl").read_text().count("\n") == 1
    (tmp_path / "throughput.jsonl").unlink()
    assert read_metrics(path) == [{"step": 1, "ev": 0.5}]
