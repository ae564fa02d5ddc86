import json
import logging

import pytest
from tests.training.helpers import run, tiny

from circuitmill.errors import ConfigError, InterruptedRun
from circuitmill.training import profile


def steps_in(path) -> int:
    """Updates that a trace holds."""
    events = json.loads(path.read_text())["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


def test_so_many_steps_after_the_tenth_are_a_chrome_trace(tmp_path):
    path = tmp_path / "profile" / "rank-0.json"
    state, _ = run(tiny(monitor__profile_steps=3), trace=path)
    assert state.step == 20 and steps_in(path) == 3


def test_a_training_that_ends_sooner_leaves_the_steps_there_were(tmp_path):
    path = tmp_path / "rank-0.json"
    run(tiny(monitor__profile_steps=50), trace=path)
    assert steps_in(path) == 10
    asked = iter([False] * 11 + [True])
    with pytest.raises(InterruptedRun):
        run(tiny(monitor__profile_steps=50), trace=path, stop=lambda: next(asked))
    assert steps_in(path) == 2


def test_nothing_changes_in_the_training(tmp_path):
    plain, profiled = run(tiny())[0], run(tiny(monitor__profile_steps=3), trace=tmp_path / "trace.json")[0]
    assert plain.transcoder.W_enc.equal(profiled.transcoder.W_enc)


def test_off_records_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "_Recording", None)
    run(tiny(), trace=tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())


def test_too_short_a_training_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tiny(tokens=320, monitor__profile_steps=3), trace=tmp_path / "trace.json")
    assert "no more than 10 steps" in caplog.text and not list(tmp_path.iterdir())


def test_a_profile_needs_a_file():
    with pytest.raises(ConfigError, match=r"train\.monitor\.profile_steps"):
        run(tiny(monitor__profile_steps=3))
