"""Jobs on one machine get GPUs of their own; a killed one gives them back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from circuitmill import gpus
from circuitmill.errors import ConfigError

SHARES = "cache_shard=1,run_train=3"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpus.tempfile, "tempdir", None)
    yield
    for file in gpus._held:
        file.close()
    gpus._held.clear()


def taken(rule: str, pool: str = "4,5,7", wait_s: float = 5.0) -> str:
    env = {gpus.POOL: pool, gpus.SHARES: SHARES}
    gpus.lease(rule, env, wait_s)
    assert gpus.POOL not in env
    return env[gpus.VISIBLE]


def holder(rule: str) -> subprocess.Popen[str]:
    """Another process with the GPUs of a rule, which it prints."""
    code = "import os, sys, time; from circuitmill import gpus; gpus.lease(sys.argv[1])\n"
    code += "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
    env = {**os.environ, gpus.POOL: "4,5,7", gpus.SHARES: SHARES}
    return subprocess.Popen([sys.executable, "-c", code, rule], env=env, stdout=subprocess.PIPE, text=True)


def test_without_a_pool_nothing_changes():
    env = {gpus.VISIBLE: "3"}
    gpus.lease("run_train", env)
    assert env == {gpus.VISIBLE: "3"}


def test_every_job_has_its_own_and_a_job_without_has_none():
    assert [taken("cache_shard") for _ in range(3)] == ["4", "5", "7"]
    assert taken("run_interpret") == ""
    with pytest.raises(ConfigError, match=r"1 free GPUs of 4, 5, 7 .*\n?.*4 by process \d+, 5 by process"):
        taken("cache_shard", wait_s=0.0)


def test_one_that_asks_for_more_than_there_are():
    with pytest.raises(ConfigError, match="at most 2 GPUs; found 3 for run_train"):
        taken("run_train", pool="0,1")


def test_other_processes_are_respected_until_they_are_killed():
    other = holder("cache_shard")
    assert other.stdout is not None and other.stdout.readline() == "4\n"
    assert taken("cache_shard") == "5"
    with pytest.raises(ConfigError, match=f"4 by process {other.pid}"):
        taken("run_train", wait_s=0.0)
    # what was taken on the way was given back
    assert taken("cache_shard") == "7"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert taken("cache_shard") == "4"
