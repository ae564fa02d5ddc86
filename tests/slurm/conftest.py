"""A real Slurm of four virtual nodes on this machine, for tests that take the fixture `slurm`.

The script `cluster` beside this file starts it; it wants root and the packages munge, slurmctld, slurmd and
slurm-client, which no test installs: without them the tests are skipped. `tests/slurm/cluster start` once, and it stays
for as many test sessions as there are; one that a session had to start is stopped by the last process that uses it.

Tests of several pytest workers share the cluster. One that takes nodes down, restarts the controller or fills nodes up
takes `slurm_alone` instead, and no other runs meanwhile.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock
from tests.containers.conftest import image  # noqa: F401 - a fixture of tests here too

SCRIPT = Path(__file__).with_name("cluster")
PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue", "sbatch")
SHARED = Path(tempfile.gettempdir()) / "circuitmill-slurm-tests"
_SEPARATOR = "\x1f"


class SlurmJob(NamedTuple):
    """A line of squeue."""

    id: str
    """Of an array's task: `12_3`."""
    name: str
    state: str
    """RUNNING, PENDING, COMPLETED, FAILED, ..."""
    reason: str
    partition: str
    nodes: str
    comment: str
    folder: str


class Slurm:
    """What tests do with the cluster."""

    partitions = ("cpu", "gpu", "all", "preempt")

    def run(self, *command: str | Path, check: bool = True, timeout: int = 120, cwd: Path | None = None) -> str:
        """Run a command and return what it prints.

        Raises:
            AssertionError: it failed, if `check`, or ran out of time.
        """
        # a snakemake that waits for jobs which never end ignores SIGTERM
        limited = ["timeout", "-k", "10", str(timeout), *map(str, command)]
        done = subprocess.run(limited, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode not in (124, 137), f"{command} took over {timeout} s:\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, *, name: str | None = None, states: str = "all") -> list[SlurmJob]:
        """The jobs that squeue knows, finished ones too, tasks of arrays one by one; of one job name if it is given."""
        fields = _SEPARATOR.join(("%i", "%j", "%T", "%r", "%P", "%N", "%k", "%Z"))
        chosen = [f"--name={name}"] if name else []
        text = self.run("squeue", "--noheader", "--array", f"--states={states}", f"--format={fields}", *chosen)
        return [SlurmJob(*line.split(_SEPARATOR)) for line in text.splitlines()]

    def job(self, job_id: str) -> SlurmJob:
        """One job.

        Raises:
            AssertionError: squeue does not know it.
        """
        found = [job for job in self.jobs() if job.id == job_id]
        assert found, f"no job {job_id} in:\n{self.picture()}"
        return found[0]

    def submit(self, script: str, *options: str, folder: Path) -> str:
        """Submit a line of shell, working in `folder`, and return the job's id."""
        text = self.run(
            "sbatch", "--parsable", f"--chdir={folder}", "--output=%j.log", "--mem=100", *options, f"--wrap={script}"
        )
        return text.strip().split(";")[0]

    def cancel(self, job_ids: Sequence[str], *, timeout: int = 60) -> None:
        """Cancel jobs and wait till nothing of them runs."""
        if job_ids:
            self.run("scancel", *job_ids)
        left = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")
        self.wait_for(
            lambda: not any(job.state in left for job in self.jobs() if job.id.split("_")[0] in job_ids),
            timeout=timeout,
            what=f"end of {job_ids}",
        )

    def wait_for(self, predicate: Callable[[], object], *, timeout: int = 60, what: str = "condition") -> None:
        """Wait until `predicate()` is true.

        Raises:
            AssertionError: it is still false after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, f"no {what} within {timeout} s; the cluster:\n{self.picture()}"
            time.sleep(0.2)

    def wait_for_state(self, job_id: str, *states: str, timeout: int = 60) -> None:
        """Wait until a job is in one of the states."""
        self.wait_for(lambda: self.job(job_id).state in states, timeout=timeout, what=f"{job_id} in {states}")

    def node_state(self, node: str) -> str:
        """What sinfo calls it: idle, mixed, allocated, down, ..."""
        return self.run("sinfo", "--noheader", "--nodes", node, "--format=%T").split()[0]

    def node_down(self, node: str) -> None:
        """Declare a node dead; Slurm requeues what ran there."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def node_up(self, node: str) -> None:
        """Bring a node back and wait until it takes jobs."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # refused if it is up
        self.wait_for(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), what=f"node {node} up")

    def restart_controller(self) -> None:
        """Kill slurmctld and start it again from its saved state."""
        self.run(SCRIPT, "restart-controller")

    def picture(self) -> str:
        """Nodes and jobs as text, for messages."""
        jobs = self.run("squeue", "--states=all", "--array", "--format=%i %P %j %T %r %N %k", check=False)
        return self.run("sinfo", "-N", "-o", "%N %T %P", check=False) + jobs


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "only root can start a Slurm of its own"
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"not installed: {', '.join(missing)} (`tests/slurm/cluster start` installs them)" if missing else None


def _script(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), command], capture_output=True, text=True, check=False, timeout=300)


def _users() -> list[Path]:
    """Files named after the processes that use the cluster; those of dead ones are removed."""
    files = list((SHARED / "users").iterdir())
    for file in files:
        if not Path(f"/proc/{file.name}").exists():
            file.unlink()
    return [file for file in files if file.exists()]


@contextmanager
def _used() -> Iterator[None]:
    """The cluster runs; it is stopped after the last user if a user started it."""
    (SHARED / "users").mkdir(parents=True, exist_ok=True)
    started, lock = SHARED / "started", FileLock(SHARED / "lock")
    me = SHARED / "users" / str(os.getpid())
    with lock:
        if _script("status").returncode != 0:
            done = _script("start")
            assert done.returncode == 0, done.stdout + done.stderr
            started.touch()
        me.touch()
    try:
        yield
    finally:
        with lock:
            me.unlink()
            if not _users() and started.exists():
                started.unlink()
                done = _script("stop")
                assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of nodes n1 to n4, the last two with four fake GPUs, and partitions cpu, gpu, all and preempt."""
    if reason := _why_not():
        pytest.skip(reason)
    with _used():
        cluster = Slurm()
        there = set(cluster.run("sinfo", "--noheader", "--format=%R").split())
        assert there == set(Slurm.partitions), f"a cluster with other partitions runs: {there}; stop it"
        yield cluster


@pytest.fixture
def slurm_alone(slurm: Slurm) -> Slurm:
    """The cluster while no other test uses it: all nodes are up when the test is over."""
    return slurm


@pytest.fixture(autouse=True)
def _turns(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with `slurm_alone` run alone on the cluster, those with `slurm` together."""
    if not {"slurm", "slurm_alone"} & set(request.fixturenames):
        yield
        return
    cluster: Slurm = request.getfixturevalue("slurm")
    alone = "slurm_alone" in request.fixturenames
    with (SHARED / "turns").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
        if alone:
            for node in ("n1", "n2", "n3", "n4"):
                cluster.node_up(node)
