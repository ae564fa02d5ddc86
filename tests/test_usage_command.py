"""`circuitmill usage`: of a run with two variants, in part without benchmark files."""

import json
from pathlib import Path

import pytest
from tests.viz.run_on_disk import write_run

from circuitmill import cli
from circuitmill.stores.timing import TIMING

ROW = {"s": 7200.0, "cpu_time": 100.0, "max_rss": 500.0, "threads": 8}
"""Of a job that kept hardly any of its CPUs busy."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "demo"
    write_run(folder, "main")
    write_run(folder, "sparse", 14.0, seed=1)
    for variant, gpus in (("main", "gpu:4"), ("sparse", "gpu:a100:2")):
        resources = {"gres": gpus, "nodes": 1, "mem_mb": 16000, "runtime": 1440}
        path = folder / f"benchmarks/{variant}/train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ROW | {"resources": resources, "rule_name": "run_train"}) + "\n")
        timing = folder / variant / "train" / TIMING
        timing.write_text(json.dumps(json.loads(timing.read_text()) | {"peak_memory_bytes": 2_000_000_000}))
    return folder


def usage(run: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert cli.main(["usage", str(run), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_stages_of_all_variants_are_added_up(run: Path, capsys: pytest.CaptureFixture[str]):
    said = usage(run, capsys)
    stages = {stage["name"]: stage for stage in said["stages"]}
    assert said["run"] == "demo" and stages["cache"]["jobs"] > 1 and stages["evaluate"]["jobs"] == 2
    train = stages["train"]
    assert (train["jobs"], train["benchmarked"], train["gpus"]) == (2, 2, 4)
    assert (train["wall_seconds"], train["longest_requested_seconds"]) == (14400.0, 86400)
    assert train["gpu_hours"] == 4 * 2 + 2 * 2
    assert train["peak_requested_bytes"] == 16_000_000_000
    written = [path for path in run.rglob("train/**/*") if path.is_file() and path.suffix not in (".json", ".jsonl")]
    metrics = [run / variant / "train/metrics.jsonl" for variant in ("main", "sparse")]
    assert train["bytes"] == sum(path.stat().st_size for path in (*written, *metrics))
    assert stages["features"]["benchmarked"] == 0 and stages["features"]["peak_requested_bytes"] is None
    assert [one["what"] for one in said["predictions"]][1:] == [
        "train of main: memory of the process",
        "train of sparse: memory of the process",
    ]
    assert {(one["rule"], one["resource"]) for one in said["suggestions"]} == {
        ("run_train", "mem_mb"),
        ("run_train", "runtime"),
        ("run_train", "cpus"),
    }


def test_text_has_the_table_and_a_line_per_rule(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["usage", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (train,) = [line for line in lines if line.startswith(" train  ")]
    assert "4 h 0 min" in train and "2 h 0 min of 24 h" in train and "2 GB of 16 GB" in train and " 12 " in train
    assert lines[-1].startswith("run_train asks 16000 MB, used at most 2000 MB") and "asks 8 CPUs" in lines[-1]
    assert lines[-1].endswith(" in 2 jobs. Would do: {mem_mb: 3400, runtime: 240, cpus: 1}")
    assert any(line.startswith("note: There is no benchmark file of toyworld") for line in lines)


def test_what_is_missing_is_null_and_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "demo"
    write_run(folder)
    for path in folder.rglob(TIMING):
        path.unlink()
    said = usage(folder, capsys)
    for stage in said["stages"]:
        values = [stage[key] for key in ("wall_seconds", "cpu_seconds", "peak_bytes", "gpu_hours", "longest_seconds")]
        assert values == [None] * 5
    assert not said["benchmarks"] and len(said["notes"]) == 2


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["usage", str(folder)]) == 1
        assert "name results/<run>" in capsys.readouterr().err
