"""What squeue prints, as it printed it, and cancelling with stand-ins for squeue and scancel."""

import os
from pathlib import Path

import pytest

from circuitmill.cluster.slurm import FINISHED, available, cancel_jobs, jobs_of, parse_restarts, parse_squeue
from circuitmill.errors import ClientError

SAMPLES = Path(__file__).with_name("samples")
RUN = "circuitmill_3c9b74d3-5220-45ec-8327-8e8d2d8850ff"


def line(job: str, name: str, state: str, folder: Path) -> str:
    return "\x1f".join((job, name, state, "None", "cpu", "n1", "0:01", str(folder), "rule_train"))


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that squeue prints; scancel notes what it is asked and removes those lines unless `deaf` is there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    file = tmp_path / "queue"
    file.touch()
    scripts = {
        "squeue": f'test -e {tmp_path}/broken && {{ echo "slurm_load_jobs error" >&2; exit 1; }}\n'
        f'case "$*" in *--Format=*) sed "s/\\x1f.*/ 2/" {file} ;; *) cat {file} ;; esac',
        "scancel": f'echo "$*" >> {tmp_path}/asked\n'
        f'test -e {tmp_path}/deaf && {{ echo "Kill job error" >&2; exit 1; }}\n'
        f'for job; do sed -i "/^$job\\x1f/d" {file}; done',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return file


def test_jobs_of_squeue():
    jobs = {job.id: job for job in parse_squeue((SAMPLES / "squeue.txt").read_text())}
    assert set(jobs) == {"110", "111_1", "111_2", "111_3", "111_4", "112"}
    one = jobs["110"]
    assert (one.name, one.state, one.reason, one.partition, one.nodes) == (RUN, "RUNNING", "", "cpu", "n1")
    assert (one.elapsed, one.folder) == ("0:10", Path("/scratch/ada/circuitmill"))
    assert one.rule() == ("bad_prompt", "main_two_hop-00")
    assert (jobs["112"].reason, jobs["112"].nodes, jobs["112"].rule()) == ("BeginTime", "", ("pend", ""))
    # the comment of all of an array's tasks is that of the first
    assert {jobs[f"111_{k}"].rule() for k in (1, 2, 3, 4)} == {("cache_shard", "")}
    assert all(job.active for job in jobs.values())


def test_requeued_jobs():
    restarts = parse_restarts((SAMPLES / "restarts.txt").read_text())
    assert restarts == {"110": 0, "111_1": 1, "111_2": 0, "111_3": 0, "111_4": 0, "112": 0}


def test_output_of_another_form_is_refused():
    with pytest.raises(ClientError, match="9 fields"):
        parse_squeue("12 cpu wrap\n")


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "REQUEUED", "STAGE_OUT", "SPECIAL_EXIT", "A_NEW_ONE"])
def test_a_state_that_is_not_known_to_be_final_counts_as_active(state: str):
    (job,) = parse_squeue(line("1", RUN, state, Path("/a")))
    assert job.active and state not in FINISHED


def test_jobs_of_a_run_are_those_of_its_name_and_folder(queue: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    queue.write_text(
        "\n".join(
            (
                line("1", "circuitmill_1", "RUNNING", tmp_path),
                line("2", "circuitmill_12", "RUNNING", tmp_path),
                line("3", "circuitmill_1", "RUNNING", tmp_path / "other"),
                line("4_1", "circuitmill_1", "PENDING", link),
            )
        )
    )
    assert {job.id: job.restarts for job in jobs_of(["circuitmill_1"], tmp_path)} == {"1": 2, "4_1": 2}
    assert jobs_of([], tmp_path) == []


def test_cancelling_asks_once_for_each_job_and_waits(queue: Path, tmp_path: Path):
    mine = [line(job, "circuitmill_1", "RUNNING", tmp_path) for job in ("1", "2_1", "2_2")]
    done = line("3", "circuitmill_1", "COMPLETED", tmp_path)
    others = [line("4", "circuitmill_2", "RUNNING", tmp_path), line("5", "circuitmill_1", "RUNNING", tmp_path.parent)]
    queue.write_text("\n".join([*mine, done, *others]) + "\n")
    told: list[str] = []
    cancel_jobs(["circuitmill_1"], tmp_path, 20, told.append)
    assert (tmp_path / "asked").read_text() == "1 2_1 2_2\n"
    assert told == ["cancelling 3 Slurm jobs: 1 2_1 2_2", "no Slurm job of the run is left (3 cancelled)"]
    assert queue.read_text().splitlines() == [done, *others]


def test_jobs_that_stay_are_named_with_what_scancel_said(queue: Path, tmp_path: Path):
    (tmp_path / "deaf").touch()
    queue.write_text(line("7", "circuitmill_1", "RUNNING", tmp_path) + "\n")
    with pytest.raises(ClientError, match="found 7 RUNNING; scancel says: Kill job error"):
        cancel_jobs(["circuitmill_1"], tmp_path, 1.5, lambda _: None)
    assert (tmp_path / "asked").read_text() == "7\n"


def test_slurm_that_does_not_answer(queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert available()
    (tmp_path / "broken").touch()
    with pytest.raises(ClientError, match="slurm_load_jobs error"):
        jobs_of(["circuitmill_1"], tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not available()
    with pytest.raises(ClientError, match="an answer from Slurm"):
        jobs_of(["circuitmill_1"], tmp_path)
