"""Jobs in the conda environments of envs/: their pins are all that stages import; the package is the checkout's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

from circuitmill.stores.manifest import load_manifest

pytestmark = pytest.mark.slow


@pytest.fixture
def conda(tmp_path: Path) -> Path:
    """A folder with a program `conda`; see stand_in_conda.py."""
    programs = tmp_path / "conda/bin"
    programs.mkdir(parents=True)
    script = shutil.copy(Path(__file__).with_name("stand_in_conda.py"), tmp_path / "conda")
    (programs / "conda").write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    (programs / "conda").chmod(0o755)
    (programs / "activate").write_text('export PATH="$1/bin:$PATH" CONDA_PREFIX="$1"\n')
    return programs


def test_stages_find_all_they_import(tiny_run: Path, conda: Path, tmp_path: Path):
    folder = tmp_path / "checkout"
    shutil.copytree(tiny_run, folder, copy_function=shutil.copy2)
    shutil.copytree(REPOSITORY / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    main = folder / "results/tiny/main"
    prompt = min(path.name for path in (main / "attribute/prompt").iterdir())
    units = ["interpret/block/0000/manifest.json", f"attribute/prompt/{prompt}/manifest.json"]
    for unit in units:
        shutil.rmtree((main / unit).parent)
    targets = [f"results/tiny/main/{unit}" for unit in units]
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *targets, "--config", "run=tiny"]
    done = subprocess.run(
        [*command, "--software-deployment-method", "conda"],
        cwd=folder,
        env={**os.environ, "PATH": f"{conda}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert {"core.yaml", "interpret.yaml"} == set(re.findall(r"Creating conda environment \S*?(\w+\.yaml)", printed))
    assert len(list((folder / ".snakemake/conda").glob("*/started"))) == 2
    for unit in units:
        made = load_manifest(main / unit)
        assert made.digest == load_manifest(tiny_run / "results/tiny/main" / unit).digest, unit
