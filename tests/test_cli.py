"""The command line: help without torch, errors as exit codes, no tracebacks for what a user can get wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from circuitmill import cli
from circuitmill.pipeline import STAGES
from circuitmill.stores.manifest import StageOutput


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 1


def test_help_names_every_stage_and_imports_no_torch():
    code = (
        "import sys; from circuitmill.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert stage.name in done.stdout


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_help_lists_its_inputs(stage, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main([stage.name, "--help"])
    text = capsys.readouterr().out
    for name in (*stage.upstream, "config", "out", *([stage.unit] if stage.unit else [])):
        assert f"--{name}" in text


def test_neither_config_nor_experiment(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["toyworld", "--out", "x"]) == 2
    text = capsys.readouterr().err
    assert "ConfigError: either --config FILE or experiment=NAME; found neither" in text and "fix:" in text


def test_config_file_and_overrides_together(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["toyworld", "toyworld.seed=1", "--config", "a.yaml", "--out", "x"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_unknown_unit(capsys: pytest.CaptureFixture[str]):
    arguments = ["cache", "experiment=demo", "--shard", "train-77777", "--out", "x"]
    arguments += ["--tokenize", "x", "--calibrate", "x"]
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert "found train-77777" in text and "train-00000" in text


def test_missing_required_input():
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "experiment=demo", "--out", "x"])
    assert caught.value.code == 2


def test_stage_that_the_run_does_not_have(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["toyworld", "experiment=gpt2", "--out", "x"]) == 2
    assert "a run that has stage toyworld; found gpt2" in capsys.readouterr().err


def test_config_prints_what_it_decoded(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "experiment=demo", "train.seed=4242", "--stage", "train"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# train of run demo, variant main") and "seed: 4242" in text


def test_config_of_a_variant_shows_the_shared_stages_it_uses(capsys: pytest.CaptureFixture[str]):
    command = ["config", "experiment=codec_study", "--stage", "cache"]
    assert cli.main([*command, "--variant", "int4-1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# cache of run codec_study, variant int4-0") and text.count("codec: int4") == 1
    assert text.count("codec:") == 1
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("codec:") == 5
    assert cli.main([*command, "--variant", "int3-0"]) == 2
    assert "a variant of run codec_study" in capsys.readouterr().err


def test_verify_and_summary_of_an_empty_folder(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert cli.main(["summary", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert "at least one manifest.json; found none" in text and "a finished report; found none" in text


def test_verify_says_what_is_good_and_what_is_not(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results/small/tokenize"
    output = StageOutput("tokenize", Config(), {}, folder)
    output.path("data", "a.txt").write_text("data")
    output.path("b.txt").write_text("more data")
    output.finish({"n": 3})
    for path in ("results/small", "results/small/tokenize", "results/small/tokenize/manifest.json"):
        assert cli.main(["verify", path]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "results/small/tokenize/manifest.json: 2 files, 13 bytes good",
            "1 manifests, 2 files, 13 bytes read: all good",
        ]
    (folder / "data/a.txt").write_text("dada")
    (folder / "b.txt").unlink()
    assert cli.main(["verify", "results/small"]) == 1
    manifest = "results/small/tokenize/manifest.json"
    fix = f"  fix:      rm {manifest} && snakemake {manifest} --config run=small"
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "problem: results/small/tokenize/b.txt",
        "  expected: 9 bytes",
        "  found:    no such file",
        fix,
    ]
    assert lines[4] == "problem: results/small/tokenize/data/a.txt" and lines[7] == fix
    assert lines[5].startswith("  expected: sha256 3a6eb079") and lines[6].startswith("  found:    sha256 ")
    assert lines[-1] == "1 manifests, 2 files, 4 bytes read: 2 problems"


def test_verify_of_a_path_that_is_not_there(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(tmp_path / "missing")]) == 1
    assert "StoreError" in (text := capsys.readouterr().err) and "no such path" in text


@pytest.mark.parametrize(
    ("given", "expected"), [([], None), (["--base"], None), (["--base", "b.json"], Path("b.json"))]
)
def test_training_takes_a_base_or_none(
    given: list[str], expected: Path | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    config = tmp_path / "train.yaml"
    from circuitmill.config.compose import freeze, load_run
    from circuitmill.stages import train

    config.write_text(freeze(load_run("tiny").plain["train"]["main"], "train"))
    calls = []
    monkeypatch.setattr(train, "run", lambda cfg, **inputs: calls.append(inputs))
    upstreams = ["--toyworld", "--tokenize", "t.json", "--cache", "c.json"]
    assert cli.main(["train", "--config", str(config), *upstreams, *given, "--out", "x"]) == 0
    paths = {"toyworld": None, "tokenize": Path("t.json"), "cache": Path("c.json"), "out": Path("x")}
    assert calls == [paths | {"base": expected}]
