"""The record of controllers, and the command lines that are made of it."""

import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from circuitmill.cluster.controllers import (
    parse_controllers,
    read_record,
    resume_command,
    run_and_overrides,
    snakemake_config,
    unlock_command,
)
from circuitmill.controllers import FILE, record
from circuitmill.errors import ConfigError, StoreError

LINE = {
    "pid": 7,
    "host": "login1",
    "started": "2026-11-29T15:36:32.854552+00:00",
    "log": ".snakemake/log/a.log",
    "argv": ["/home/ada/.venv/bin/snakemake", "all", "--config", "run=tiny"],
    "folder": "/scratch/ada/circuitmill",
}


def line(**changes: object) -> str:
    return json.dumps({**LINE, **changes}) + "\n"


def test_records_are_read_in_order():
    first, second = parse_controllers(line() + line(pid=8), "here")
    assert (first.pid, second.pid, first.host) == (7, 8, "login1")
    assert first.started == datetime(2026, 11, 29, 15, 36, 32, 854552, tzinfo=UTC)
    assert first.log_path() == Path("/scratch/ada/circuitmill/.snakemake/log/a.log")
    assert first.plain() == LINE
    assert parse_controllers("", "here") == []


@pytest.mark.parametrize("kept", [1, 20, 200])
def test_a_last_line_without_its_end_counts_as_not_written(kept: int):
    (only,) = parse_controllers(line() + line(pid=8)[:kept], "here")
    assert only.pid == 7


@pytest.mark.parametrize(
    "text",
    [
        "not json\n",
        "[]\n",
        "{}\n",
        line(pid="7"),
        line(pid=True),
        line(argv=[]),
        line(argv=[1]),
        line(started="yesterday"),
        line(started="2026-11-29T15:36:32"),
        line()[:40] + "\n",
    ],
)
def test_an_odd_line_is_named(text: str):
    with pytest.raises(StoreError, match=r"one JSON object a line(.|\n)*where: here, line 2"):
        parse_controllers(line() + text, "here")


def test_what_the_workflow_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snakemake", "--config", "run=tiny"])
    run = Path("results/tiny")
    record(run, ".snakemake/log/1.log")
    record(run, str(tmp_path / ".snakemake/log/2.log"))
    with (run / FILE).open("a") as file:
        file.write('{"pid": 1, "ho')  # a crash
    found = read_record(run)
    first, second = found.controllers
    assert (first.pid, first.host, first.folder) == (os.getpid(), socket.gethostname(), tmp_path)
    assert [one.log_path() for one in (first, second)] == [tmp_path / f".snakemake/log/{k}.log" for k in (1, 2)]
    assert found.newest is second and second.argv == ("snakemake", "--config", "run=tiny")
    assert found.folder == tmp_path / "results/tiny"


def test_results_that_were_copied_are_another_checkout_s(tmp_path: Path):
    copied = tmp_path / "copy/results/tiny"
    (copied / "logs").mkdir(parents=True)
    (copied / FILE).write_text(line(folder=str(tmp_path / "first")) + line(folder=str(tmp_path / "copy")))
    found = read_record(copied)
    assert [str(one.folder) for one in found.controllers] == [str(tmp_path / "copy")]
    assert [str(one.folder) for one in found.foreign] == [str(tmp_path / "first")]


def test_results_may_be_a_link_to_another_disk(tmp_path: Path):
    disk, checkout = tmp_path / "disk", tmp_path / "checkout"
    (disk / "tiny/logs").mkdir(parents=True)
    checkout.mkdir()
    (checkout / "results").symlink_to(disk)
    (disk / "tiny" / FILE).write_text(line(folder=str(checkout)))
    assert len(read_record(checkout / "results/tiny").controllers) == 1


def test_a_run_without_a_record(tmp_path: Path):
    with pytest.raises(StoreError, match="a run's folder"):
        read_record(tmp_path / "results/none")
    (tmp_path / "config").mkdir()
    assert read_record(tmp_path).controllers == ()
    (tmp_path / FILE).mkdir(parents=True)
    with pytest.raises(StoreError, match="a record of controllers"):
        read_record(tmp_path)
    (tmp_path / FILE).rmdir()
    (tmp_path / FILE).write_bytes(b"\xff\n")
    with pytest.raises(StoreError, match="a record of controllers"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("all --config run=tiny set=train.lr=1e-3 --jobs 4", {"run": "tiny", "set": "train.lr=1e-3"}),
        ("--config run=a --config run=b", {"run": "b"}),
        ("-C run=a -n", {"run": "a"}),
        ("--config=run=a where=b", {"run": "a", "where": "b"}),
        ("--configfile run=a", {}),
        ("--config run=a --set-threads run=b", {"run": "a"}),
        ("all", {}),
    ],
)
def test_what_a_command_line_configures(words: str, expected: dict[str, str]):
    assert snakemake_config(["snakemake", *words.split()]) == expected


def test_experiment_and_overrides():
    argv = ["snakemake", "--config", "run=tiny", "set=train.lr=1e-3 'train.note=a b'", "--dry-run"]
    assert run_and_overrides(argv) == ("tiny", ["train.lr=1e-3", "train.note=a b"])
    assert run_and_overrides(["snakemake"]) == ("demo", [])
    with pytest.raises(ConfigError, match="quotes that match"):
        run_and_overrides(["snakemake", "--config", "set='a"])


@pytest.mark.parametrize(
    ("argv", "extra", "expected"),
    [
        ("s all --config run=a", "", "s --rerun-incomplete all --config run=a"),
        ("s --ri all --config run=a", "", "s --ri all --config run=a"),
        ("s all", "--rerun-incomplete -n", "s all --rerun-incomplete -n"),
        ("s --config run=a -- all", "--jobs 3", "s --rerun-incomplete --config run=a --jobs 3 -- all"),
        ("/v/snakemake/__main__.py all", "", f"{sys.executable} -m snakemake --rerun-incomplete all"),
    ],
)
def test_the_command_that_goes_on(argv: str, extra: str, expected: str):
    assert resume_command(argv.split(), extra.split()) == expected.split()
    assert unlock_command(argv.split())[-len(argv.split()) :] != argv.split()
    assert "--unlock" in unlock_command(argv.split())


@pytest.mark.parametrize("extra", ["train", "--jobs 3 --config run=b", "--config=run=b", "-C run=b"])
def test_extra_words_that_would_make_another_run(extra: str):
    with pytest.raises(ConfigError):
        resume_command(["snakemake", "--config", "run=a"], extra.split())
