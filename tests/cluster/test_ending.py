"""`circuitmill cancel` and `resume` with stand-ins for snakemake and without Slurm."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.small_checkout import end, make_checkout, record, start, wait_for

from circuitmill.cli import main
from circuitmill.cluster import slurm

ARGV = ["all", "--config", "run=tiny"]
COMMAND = [sys.executable, "-m", "circuitmill"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slurm, "available", lambda: False)
    return make_checkout(tmp_path)


def calls(checkout: Path) -> list[str]:
    """How the stand-in was called."""
    file = checkout / "calls"
    return file.read_text().splitlines() if file.exists() else []


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) != 0
    return capsys.readouterr().err


def test_cancel_ends_a_local_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    controller = start(tmp_path, "quick", *ARGV)
    try:
        assert main(["cancel", str(run), "--timeout", "60"]) == 0
        assert capsys.readouterr().out == f"controller {controller.pid} ended on SIGINT\n"
        assert controller.wait(timeout=10) == 1
        assert main(["cancel", str(run)]) == 0
        assert capsys.readouterr().out == "no controller runs on this machine\n"
    finally:
        end(controller)


def test_resume_becomes_the_recorded_command(run: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    record(tmp_path, ARGV)
    command = [*COMMAND, "resume", str(run), "--timeout", "60", "--", "--jobs", "3"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr  # the stand-in's
    assert calls(tmp_path) == [
        "--unlock all --config run=tiny",
        "--rerun-incomplete all --config run=tiny --jobs 3",
    ]
    assert done.stdout.splitlines()[-1].startswith(f"starting: {tmp_path}/snakemake --rerun-incomplete")


def test_a_dry_run_does_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record(tmp_path, ["all", "--config", "run=tiny", "set=a=1 b=2"])
    work = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "circuitmill", "--out", "results/tiny/cache"],
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        assert main(["resume", str(run), "--dry-run", "--", "-n"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"kill {work.pid}",
            f"cd {tmp_path}",
            f"{tmp_path}/snakemake --unlock all --config run=tiny 'set=a=1 b=2'",
            shlex.join([f"{tmp_path}/snakemake", "--rerun-incomplete", *ARGV, "set=a=1 b=2", "-n"]),
        ]
        assert calls(tmp_path) == [] and work.poll() is None
    finally:
        end(work)


def test_a_living_controller_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    controller = start(tmp_path, "quick", *ARGV)
    record(tmp_path, ARGV)  # a newer one that is dead does not hide it
    try:
        said = refused(capsys, "resume", str(run))
        assert f"already running, pid {controller.pid}" in said and f"circuitmill cancel {run}" in said
        assert controller.poll() is None and len(calls(tmp_path)) == 1
    finally:
        end(controller)


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_a_controller_of_another_machine_is_believed_dead_only_on_request(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    record(tmp_path, ARGV, host="login7")
    said = refused(capsys, command, str(run))
    assert "on login7, which may live" in said and "--elsewhere" in said
    words = [command, str(run), "--elsewhere"] + ["--dry-run"] * (command == "resume")
    assert main(words) == 0
    record(tmp_path, ARGV, host="login7", log="Complete log(s): x\n")  # this one has ended by itself
    assert main([word for word in words if word != "--elsewhere"]) == 0


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_nothing_is_guessed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str):
    assert "a recorded controller" in refused(capsys, command, str(run))
    record(tmp_path, ARGV, folder=str(tmp_path / "first"))
    assert f"only some that worked on {tmp_path}/first/results" in refused(capsys, command, str(run))
    record(tmp_path, ARGV, log="SLURM run ID: circuitmill_1\n")
    assert "no squeue on PATH" in refused(capsys, command, str(run))
    (tmp_path / "controller.log").unlink()
    assert "Snakemake's log of the newest controller" in refused(capsys, command, str(run))
    assert calls(tmp_path) == []


def test_resume_does_not_start_what_cannot_be_unlocked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)  # it moves into the checkout
    record(tmp_path, ARGV)
    (tmp_path / "locked").touch()
    assert "cannot unlock" in refused(capsys, "resume", str(run))
    assert calls(tmp_path) == ["--unlock all --config run=tiny"]
    (tmp_path / "snakemake").unlink()
    assert "the program that the run was started with" in refused(capsys, "resume", str(run))


def test_two_resumes_do_not_start_two_controllers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program = (tmp_path / "snakemake").read_text()
    (tmp_path / "snakemake").write_text(program.replace("sys.exit(9)", "Path('second').touch(); time.sleep(600)"))
    record(tmp_path, ARGV)
    first = subprocess.Popen([*COMMAND, "resume", str(run)], cwd=tmp_path, start_new_session=True)
    try:
        wait_for(tmp_path / "second")  # it has not written itself down yet
        assert "another `resume`" in refused(capsys, "resume", str(run))
        assert len(calls(tmp_path)) == 2
    finally:
        end(first)


def test_words_of_resume(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record(tmp_path, ARGV)
    assert "options of snakemake after --" in refused(capsys, "resume", str(run), "--dry-run", "--", "train")
    with pytest.raises(SystemExit):
        main(["resume", str(run), "--jobs", "3"])  # without the --
    assert calls(tmp_path) == []
