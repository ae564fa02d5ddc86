"""Progress away from a terminal is lines with rate and remaining time."""

import logging

import pytest

from circuitmill import logs


def test_lines_tell_amount_share_rate_and_time_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 40.0, 40.0, 50.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "circuitmill.logs"), logs.progress("caching", total=100, unit="tokens") as bar:
        bar.note("loss 1.5")
        bar.advance(10)
        bar.advance(40)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "caching: 50 of 100 tokens (50%), 1 tokens/s, 40 s left loss 1.5"
    assert lines[-1] == "caching: 50 tokens in 50.0 s loss 1.5"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with logs.progress("caching", total=2, unit="shards", done=1) as bar:
        bar.advance()
        bar.note("last")
    assert "caching" in capsys.readouterr().err
