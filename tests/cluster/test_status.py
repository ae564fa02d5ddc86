"""What `circuitmill status` says, from records, logs and manifests on disk."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tests.cluster.small_checkout import end, make_checkout, record, start

from circuitmill.cli import main
from circuitmill.cluster import slurm
from circuitmill.cluster.slurm import SlurmJob
from circuitmill.cluster.status import RunStatus, plain, status_of
from circuitmill.cluster.status_text import rendered
from circuitmill.config.compose import freeze, load_run
from circuitmill.errors import ClientError, ConfigError, StoreError

SAMPLES = Path(__file__).with_name("samples")
ARGV = ["all", "--config", "run=tiny"]


def text(status: RunStatus) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rendered(status))
    return console.export_text()


def log_of(name: str, checkout: Path) -> str:
    """A sample whose files are those of a checkout."""
    return (SAMPLES / name).read_text().replace("/scratch/ada/circuitmill", str(checkout))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without Slurm, whatever this machine has."""
    monkeypatch.setattr(slurm, "available", lambda: False)
    return make_checkout(tmp_path)


def make_manifests(run: Path, *folders: str) -> None:
    for folder in folders:
        (run / folder).mkdir(parents=True, exist_ok=True)
        (run / folder / "manifest.json").touch()


def test_manifests_are_counted_against_the_configuration(run: Path, tmp_path: Path):
    record(tmp_path, ["--config", "run=tiny", "set=features.blocks=5"], log="")
    make_manifests(run, "toyworld", "cache/shard/train-00000", "cache/shard/train-99999", "main/features/block/0003")
    status = status_of(run)
    stages = {one.stage: one for one in status.stages}
    assert list(stages) == list(load_run("tiny").stage_names())
    assert (stages["toyworld"].there, stages["toyworld"].units) == (True, 0)
    # a shard that the configuration does not have counts for nothing
    assert (stages["cache"].unit, stages["cache"].units_there, stages["cache"].units) == ("shard", 1, 3)
    features = stages["features"]
    assert (features.variant, features.units_there, features.units, features.there) == ("main", 1, 5, False)
    assert (status.state, status.jobs, status.notes) == ("gone", None, ())
    shown = text(status)
    assert "1 of 3 shards" in shown and "Slurm" not in shown and "killed" in shown


def test_without_a_record_what_is_frozen_says_what_there_should_be(run: Path):
    composed = load_run("tiny")
    for stage, folder in (("cache", run / "config"), ("features", run / "main/config")):
        folder.mkdir(parents=True, exist_ok=True)
        (plain_cfg,) = composed.plain[stage].values()
        (folder / f"{stage}.yaml").write_text(freeze(plain_cfg, "test"))
    make_manifests(run, "cache/shard/heldout-00000")
    status = status_of(run)
    assert [(one.stage, one.variant, one.units_there, one.units) for one in status.stages] == [
        ("cache", "", 1, 3),
        ("features", "main", 0, 2),
    ]
    (note,) = status.notes
    assert note.startswith("no controller is recorded")
    assert "no controller is recorded" in text(status)
    (run / "config/cache.yaml").write_text("shards: [")
    with pytest.raises(ConfigError):
        status_of(run)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--config run=no-such-run", "cannot be composed"),
        ("--config run=tiny set='a", "quotes that match"),
        ("--config run=demo", "says run demo"),
    ],
)
def test_a_command_line_that_does_not_fit_is_said(run: Path, tmp_path: Path, words: str, note: str):
    record(tmp_path, words.split())
    status = status_of(run)
    assert status.stages == () and len(status.notes) == 1 and note in status.notes[0]


def test_failed_jobs_come_with_the_ends_of_their_logs(run: Path, tmp_path: Path):
    record(tmp_path, ARGV, log=log_of("slurm_ended.log", tmp_path))
    own = run.parent / "toy/logs/main/bad/two_hop-00.log"
    own.parent.mkdir(parents=True)
    own.write_text("".join(f"line {k}\n" for k in range(40)))
    of_slurm = tmp_path / ".snakemake/slurm_logs/rule_bad_prompt/main_two_hop-00/7.log"
    of_slurm.parent.mkdir(parents=True)
    of_slurm.write_bytes(b"oops \xff\n")
    status = status_of(run)
    assert status.state == "ended"
    refused, failed = status.failed
    assert [tail.lines for tail in refused.tails] == [None]
    assert [tail.path for tail in failed.tails] == [own, of_slurm]
    assert failed.tails[0].lines == tuple(f"line {k}" for k in range(20, 40))
    assert failed.tails[1].lines == ("oops \N{REPLACEMENT CHARACTER}",)
    shown = text(status)
    assert "bad_prompt (variant=main, prompt=two_hop-00) failed 2 times, Slurm job 7\n" in shown
    assert "line 39" in shown and "line 19\n" not in shown and "pend.log: no such file" in shown
    assert f"circuitmill resume {run}" in shown


def test_the_log_of_an_array_task_is_found_where_it_is(run: Path, tmp_path: Path):
    record(tmp_path, ARGV, log=log_of("array_killed.log", tmp_path))
    there = tmp_path / ".snakemake/slurm_logs/rule_cache_shard/117_2.log"
    there.parent.mkdir(parents=True)
    there.write_text("Killed\n")
    tails = [tail for one in status_of(run).failed for tail in one.tails]
    assert [tail.lines for tail in tails if tail.path == there] == [("Killed",)]


def test_slurm_jobs_are_named_by_the_log_and_else_by_their_comment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text_of_log = log_of("array_killed.log", tmp_path)
    run_id = "circuitmill_9a096780-c0a1-4a4f-b913-35ccd766817f"
    record(tmp_path, ARGV, log=text_of_log)
    asked = []

    def jobs_of(run_ids: list[str], folder: Path) -> list[SlurmJob]:
        asked.append((run_ids, folder))
        comment = "rule_cache_shard_wildcards_train-1"
        return [
            SlurmJob("123_4", run_id, "RUNNING", "", "cpu", "n2", "0:09", folder, comment, restarts=2),
            SlurmJob("124_4", run_id, "RUNNING", "", "cpu", "n1", "0:09", folder, comment),
            SlurmJob("118", run_id, "PENDING", "Priority", "cpu", "", "0:00", folder, "rule_pend"),
            SlurmJob("116", run_id, "FAILED", "NonZeroExitCode", "cpu", "n1", "0:09", folder, "rule_bad_prompt"),
        ]

    monkeypatch.setattr(slurm, "available", lambda: True)
    monkeypatch.setattr(slurm, "jobs_of", jobs_of)
    status = status_of(run)
    assert asked == [([run_id], tmp_path)]
    assert status.jobs is not None
    assert [(one.job.id, one.rule, one.wildcards) for one in status.jobs] == [
        ("123_4", "cache_shard", "train-0"),
        ("124_4", "cache_shard", ""),
        ("118", "pend", ""),
    ]
    shown = text(status)
    assert "n1 n2" in shown and "123_4 train-0, 124_4" in shown and "Priority" in shown
    data = json.loads(json.dumps(plain(status)))
    assert data["jobs"][0] == {
        "id": "123_4",
        "rule": "cache_shard",
        "wildcards": "train-0",
        "state": "RUNNING",
        "reason": "",
        "partition": "cpu",
        "nodes": "n2",
        "elapsed": "0:09",
        "restarts": 2,
    }
    assert data["failed"][0]["attempts"] == 1 and data["controller"]["state"] == "gone"


def test_slurm_that_cannot_be_asked_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(tmp_path, ARGV, log="SLURM run ID: circuitmill_1\n")
    (note,) = status_of(run).notes
    assert "commands are not on this machine" in note

    def broken(run_ids: list[str], folder: Path) -> list[SlurmJob]:
        raise ClientError("an answer", found="Connection refused", where="squeue", fix="wait")

    monkeypatch.setattr(slurm, "available", lambda: True)
    monkeypatch.setattr(slurm, "jobs_of", broken)
    status = status_of(run)
    assert status.jobs is None and "Connection refused (squeue)" in status.notes[0]


def test_controllers_that_cannot_be_looked_up(run: Path, tmp_path: Path):
    record(tmp_path, ARGV, host="elsewhere")
    status = status_of(run)
    assert status.state == "elsewhere" and "another machine" in text(status)
    (tmp_path / "controller.log").unlink()
    assert "is gone, and with it the names" in status_of(run).notes[0]
    copy = tmp_path / "copy/results/tiny"
    shutil.copytree(run, copy)
    status = status_of(copy)
    assert status.controller is None and f"worked on {tmp_path}/results/tiny" in status.notes[0]


def test_the_subcommand(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    controller = start(tmp_path, "quick", *ARGV)
    try:
        assert main(["status", str(run)]) == 0
        shown = capsys.readouterr().out
        assert f"controller {controller.pid} on" in shown and ", runs\n" in shown and "\x1b" not in shown
        assert main(["status", str(run), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert (data["run"], data["controller"]["state"], data["jobs"]) == ("tiny", "running", None)
    finally:
        end(controller)
    assert main(["status", str(tmp_path / "results/none")]) == StoreError.exit_code
    assert "where: " in capsys.readouterr().err
