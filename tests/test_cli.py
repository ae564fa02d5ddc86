"""The command line: help without torch, errors as exit codes, no tracebacks for what a user can get wrong."""

import subprocess
import sys

import pytest

from circuitmill import cli
from circuitmill.pipeline import STAGES


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
    arguments = ["cache", "experiment=demo", "--shard", "train-77777", "--tokenize", "x", "--out", "x"]
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


def test_verify_and_summary_of_an_empty_folder(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert cli.main(["summary", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert "at least one manifest.json; found none" in text and "a finished report; found none" in text
