"""Real ranks that die, freeze, fail, hang or are asked to stop: the others leave and say why, or all stop together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.distributed.stepping import AT, VICTIM

from circuitmill.errors import InterruptedRun

pytestmark = pytest.mark.slow
NET = 120
"""Seconds after which a test gives up."""


@contextmanager
def launched(folder: Path, what: str, *, per_node: int = 2, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher of ranks; whatever is left of them afterwards is killed."""
    command = [sys.executable, "-m", "tests.distributed.launched", str(per_node)]
    command += ["tests.distributed.stepping", str(folder), what]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            for pid in pids(folder):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid"))]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def outcome(folder: Path, what: str) -> tuple[int, str]:
    """Exit code and stderr of the launcher, after which no rank is left."""
    with launched(folder, what) as process:
        text = process.communicate(timeout=NET)[1]
        assert not any(alive(pid) for pid in pids(folder)), text
    return process.returncode, text


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + NET
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stepping(folder: Path, n_ranks: int) -> bool:
    files = list(folder.glob("*.steps"))
    return len(files) == n_ranks and all(len(file.read_text().split()) > AT for file in files)


def named(folder: Path) -> str:
    pid = (folder / f"{VICTIM}.pid").read_text()
    return rf"rank {VICTIM} \(host {socket.gethostname()}, pid {pid}, last heard of at (the start|step \d+)\)"


def test_a_killed_rank_is_named_by_the_other_and_by_the_launcher(tmp_path: Path):
    code, text = outcome(tmp_path, "killed")
    assert code == 1
    assert re.search(rf"rank 0 says RankError: all ranks alive; found {named(tmp_path)} was killed by SIGKILL", text), (
        text
    )
    assert f"where: rank 0, at step {AT}" in text
    pid = (tmp_path / f"{VICTIM}.pid").read_text()
    assert f"launch: rank {VICTIM} on {socket.gethostname()} (pid {pid}) was killed by SIGKILL" in text
    assert "Traceback" not in text and "elastic" not in text


def test_a_frozen_rank_is_named_and_does_not_stay(tmp_path: Path):
    """The other one is inside a collective that does not return."""
    code, text = outcome(tmp_path, "frozen")
    assert code == 1
    assert re.search(
        rf"circuitmill: rank 0: RankError: all ranks alive; found {named(tmp_path)} not heard of for 6 s", text
    ), text


def test_the_error_of_a_rank_is_quoted_by_the_other(tmp_path: Path):
    code, text = outcome(tmp_path, "raises")
    assert code == 1
    assert f"rank {VICTIM} says StoreError: a whole chunk; found half of one" in text
    quoted = "failed first, with StoreError: a whole chunk; found half of one where: chunk-7 fix: cache it again"
    assert re.search(rf"rank 0 says RankError: all ranks to go on; found {named(tmp_path)} {quoted}", text), text
    assert f"launch: rank {VICTIM} on" in text and "ended with exit code 1" in text


def test_a_collective_that_a_rank_does_not_come_to(tmp_path: Path):
    code, text = outcome(tmp_path, "asleep")
    assert code == 1
    expected = "every rank at the same collective within 15 s; found all ranks alive, but rank 0 waited in vain: "
    assert f"rank 0 says RankError: {expected}ranks 0-1 at step {AT}" in text
    # the one that sleeps is ended too
    assert f"circuitmill: rank {VICTIM}: RankError: {expected}" in text


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path):
    with launched(tmp_path, "nothing") as process:
        wait_for(lambda: stepping(tmp_path, 2))
        process.kill()
        # ends when the last rank has closed its stderr
        text = process.communicate(timeout=NET)[1]
    for rank in (0, 1):
        # whoever notices first speaks: the rank at a collective, or its watch
        said = rf"rank {rank}(:| says) RankError: an answer from the launcher of rank 0's node; found none"
        assert re.search(said, text), text


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, ["launcher"]),
        (signal.SIGUSR1, ["launcher"]),
        (signal.SIGUSR1, ["launcher", 0, 1]),
        (signal.SIGTERM, [1]),
    ],
    ids=lambda value: getattr(value, "name", None) or "+".join(map(str, value)),
)
def test_a_request_to_stop_ends_all_ranks_after_the_same_step(number: signal.Signals, to: list, tmp_path: Path):
    with launched(tmp_path, "nothing") as process:
        wait_for(lambda: stepping(tmp_path, 2))
        for who in to:
            os.kill(process.pid if who == "launcher" else pids(tmp_path)[who], number)
        text = process.communicate(timeout=NET)[1]
    assert process.returncode == InterruptedRun.exit_code, text
    left = [(tmp_path / f"{rank}.left").read_text() for rank in (0, 1)]
    assert left[0] == left[1] and int(left[0]) >= AT
    for rank in (0, 1):
        assert f"rank {rank} says InterruptedRun" in text
    assert "RankError" not in text and "ended with exit code 75" in text


def free_port() -> int:
    """Among those that a launcher can choose."""
    for port in range(20000, 40000):
        with socket.socket() as trial:
            if trial.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no free port")


def slurm(node: int, port: int) -> dict[str, str]:
    """What srun sets on one of two nodes, which are both this machine."""
    return {
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost,localhost",
    }


@pytest.mark.parametrize("what", ["SIGUSR1", "exits"])
def test_two_nodes_are_one_group_of_four_ranks(what: str, tmp_path: Path):
    """What ends them comes from node 0, whose launcher has the store: a request to stop, or an end without a word."""
    port = free_port()
    with (
        launched(tmp_path, what, **slurm(0, port)) as first,
        launched(tmp_path, what, **slurm(1, port)) as second,
    ):
        texts = [process.communicate(timeout=NET)[1] for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    assert sorted(path.name for path in tmp_path.glob("*.pid")) == [f"{rank}.pid" for rank in range(4)]
    if what == "SIGUSR1":
        assert codes == [InterruptedRun.exit_code] * 2, texts
        assert len({(tmp_path / f"{rank}.left").read_text() for rank in range(4)}) == 1
        return
    assert codes == [7, 1], texts
    for rank, text in ((0, texts[0]), (2, texts[1]), (3, texts[1])):
        assert re.search(rf"rank {rank}.* RankError: .*{named(tmp_path)} ended with exit code 7", text), text
    assert f"ended with exit code 1, after rank {VICTIM} on another node" in texts[1]
