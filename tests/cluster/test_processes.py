"""Controllers as processes: which is alive, and how they are ended, with stand-ins for snakemake."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.cluster.small_checkout import end, make_checkout, start, wait_for

from circuitmill.cluster.controllers import Controller, read_record
from circuitmill.cluster.processes import end_controller, end_local_work, local_work, process_of, state_of

WRITES = ("-m", "circuitmill", "cache", "--out", "results/tiny/cache/shard/a")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen]]:
    make_checkout(tmp_path)
    processes: list[subprocess.Popen] = []
    yield processes
    end(*processes)


def newest(checkout: Path) -> Controller:
    controller = read_record(checkout / "results/tiny").newest
    assert controller is not None
    return controller


def work(checkout: Path, *words: str, code: str = "import time; time.sleep(600)") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=checkout, start_new_session=True)


def test_a_living_controller_is_known_by_number_start_and_command(started: list[subprocess.Popen], tmp_path: Path):
    started.append(start(tmp_path, "quick", "--config", "run=tiny"))
    controller = newest(tmp_path)
    assert process_of(controller) is not None and state_of(controller, ended=False) == "running"
    others = {
        "another command": replace(controller, argv=("snakemake", "quick", "--config", "run=demo")),
        "an older record": replace(controller, started=datetime.now(UTC) - timedelta(hours=1)),
        "another process": replace(controller, pid=os.getpid()),
        "another machine": replace(controller, host="elsewhere"),
        "no process": replace(controller, pid=4_000_000),
    }
    assert {what: process_of(one) for what, one in others.items()} == dict.fromkeys(others)


def test_states_of_a_dead_controller(started: list[subprocess.Popen], tmp_path: Path):
    started.append(start(tmp_path, "quick"))
    controller = newest(tmp_path)
    started[0].kill()
    os.waitid(os.P_PID, started[0].pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for its exit code
    assert state_of(controller, ended=False) == "gone"
    assert state_of(controller, ended=True) == "ended"
    assert controller.host == socket.gethostname()
    assert state_of(replace(controller, host="elsewhere"), ended=False) == "elsewhere"
    assert state_of(replace(controller, host="elsewhere"), ended=True) == "ended"


@pytest.mark.parametrize(("mode", "used"), [("quick", "SIGINT"), ("patient", "SIGTERM"), ("deaf", "SIGKILL")])
def test_a_controller_is_ended_as_gently_as_it_goes(
    started: list[subprocess.Popen], tmp_path: Path, mode: str, used: str
):
    started.append(start(tmp_path, mode))
    told: list[str] = []
    end_controller(newest(tmp_path), 6 if mode != "quick" else 60, told.append)
    assert told == [f"controller {started[0].pid} ended on {used}"]
    assert started[0].wait(timeout=10) == {"quick": 1, "patient": -signal.SIGTERM, "deaf": -signal.SIGKILL}[mode]
    end_controller(newest(tmp_path), 1, told.append)
    assert len(told) == 1


def test_jobs_on_this_machine_end_with_their_controller(started: list[subprocess.Popen], tmp_path: Path):
    started.append(start(tmp_path, "jobs", *WRITES))
    controller = newest(tmp_path)
    process = process_of(controller)
    assert process is not None
    (job,) = process.children()
    told: list[str] = []
    end_controller(controller, 60, told.append)
    assert not job.is_running()
    assert told == [f"controller {controller.pid} ended on SIGINT"]


def test_what_a_killed_controller_left_is_found_and_ended(started: list[subprocess.Popen], tmp_path: Path):
    (tmp_path / "other").mkdir()
    mine, deaf = (
        work(tmp_path, *WRITES),
        work(
            tmp_path,
            *("/home/ada/.venv/bin/circuitmill", "train", "--out", "a", "results/tiny/main/train", "--verbose"),
            code="import signal, time; signal.signal(15, signal.SIG_IGN); open('deaf', 'w'); time.sleep(600)",
        ),
    )
    others = [
        work(tmp_path, "-m", "circuitmill", "cache", "--out", "results/tiny-2/cache"),
        work(tmp_path, "-m", "circuitmill", "serve", "results/tiny/main"),
        work(tmp_path, "tar", "--out", "results/tiny/main"),
        work(tmp_path / "other", *WRITES),
    ]
    started += [mine, deaf, *others]
    wait_for(tmp_path / "deaf")
    run = tmp_path / "results/tiny"
    assert {process.pid for process in local_work(run, tmp_path)} == {mine.pid, deaf.pid}
    told: list[str] = []
    end_local_work(run, tmp_path, 4, told.append)
    assert (mine.wait(timeout=10), deaf.wait(timeout=10)) == (-signal.SIGTERM, -signal.SIGKILL)
    assert [process.poll() for process in others] == [None] * 4
    (line,) = told
    assert line.startswith("ended on SIGKILL on this machine: ")
    assert set(line.split()[-2:]) == {str(mine.pid), str(deaf.pid)}
    end_local_work(run, tmp_path, 4, told.append)
    assert len(told) == 1
