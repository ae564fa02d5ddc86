"""Jobs on a cluster with environment modules: the site's are loaded, the interpreter stays ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.containers.conftest import begun

pytestmark = pytest.mark.slow

INIT = next(
    (path for path in (Path("/usr/share/modules/init/bash"), Path("/usr/share/lmod/lmod/init/bash")) if path.exists()),
    None,
)
MODULE = """#%Module
prepend-path PATH {folder}/bin
prepend-path PYTHONPATH {folder}/python
setenv SITE_MARK {folder}/mark
"""
NOTE = """import os, sys
with open(os.environ["SITE_MARK"], "a") as file:
    file.write(f"{sys.executable} {' '.join(sys.orig_argv[1:4])}\\n")
"""
"""Run by every interpreter that starts with the module loaded."""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module `site/1.0` that leaves marks and has a broken interpreter of its own; returns its folder."""
    if INIT is None:
        pytest.skip("neither environment-modules nor lmod is installed; .ci/run installs the first")
    folder = tmp_path / "module"
    for name in ("bin", "python", "files/site"):
        (folder / name).mkdir(parents=True)
    (folder / "files/site/1.0").write_text(MODULE.format(folder=folder))
    (folder / "python/sitecustomize.py").write_text(NOTE)
    (folder / "bin/python").write_text("#!/bin/sh\nexit 9\n")
    (folder / "bin/python").chmod(0o755)
    return folder


def tokenize(folder: Path, module: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage with a site file that names a module."""
    (folder / "site.yaml").write_text(yaml.safe_dump({"scheduler": "local", "modules": [name]}))
    known = {key: value for key, value in os.environ.items() if not key.startswith("BASH_FUNC_") and key != "BASH_ENV"}
    known |= {"CIRCUITMILL_SITE": str(folder / "site.yaml"), "MODULEPATH": str(module / "files")}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "tokenize", "--config", "run=tiny"]
    command += ["--software-deployment-method", "env-modules"]
    return subprocess.run(
        command, cwd=folder, env=known | environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_modules_are_loaded_and_the_interpreter_stays_ours(tiny_run: Path, module: Path, tmp_path: Path):
    folder = begun(tiny_run, tmp_path / "checkout")
    done = tokenize(folder, module, "site/1.0", BASH_ENV=str(INIT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (module / "mark").read_text().splitlines() == [f"{sys.executable} -m circuitmill tokenize"]


@pytest.mark.parametrize(
    ("name", "environment"),
    [("sight/1.0", {"BASH_ENV": str(INIT)}), ("site/1.0", {})],
    ids=["a module that is not there", "no module command in a job's shell"],
)
def test_no_job_runs_without_its_modules(
    name: str, environment: dict[str, str], tiny_run: Path, module: Path, tmp_path: Path
):
    folder = begun(tiny_run, tmp_path / "checkout")
    done = tokenize(folder, module, name, **environment)
    assert done.returncode != 0
    assert f"expected the module {name}" in done.stderr and "BASH_ENV" in done.stderr, done.stderr
    assert not (folder / "results/tiny/tokenize/manifest.json").exists()
