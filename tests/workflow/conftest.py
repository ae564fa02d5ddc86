"""A copy of the workflow whose stages do nothing but leave their manifests, so that the whole DAG runs in seconds."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY


@dataclass
class Workflow:
    """A checkout-like folder to run snakemake in."""

    folder: Path

    def snakemake(self, *arguments: str, check: bool = True) -> str:
        """Run snakemake there; returns everything it printed."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src")}
        environment.pop("CIRCUITMILL_CONFIG", None)
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        text = done.stdout + done.stderr
        if check:
            assert done.returncode == 0, text
        return text

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rule -> number of jobs that a dry run plans, without the target rules."""
        text = self.snakemake("-n", *arguments)
        table = re.search(r"job\s+count\n[-\s]+\n((?:\S+\s+\d+\n)+)", text)
        if table is None:
            assert "Nothing to be done" in text, text
            return {}
        rows = dict(re.findall(r"(\S+)\s+(\d+)\n", table.group(1)))
        return {name: int(count) for name, count in rows.items() if name not in ("total", "all")}


@pytest.fixture(scope="session")
def finished_workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """The demo's DAG, run once with stages that do nothing."""
    folder = tmp_path_factory.mktemp("workflow")
    for name in ("workflow", "profiles", "config", "envs", "src"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copy(REPOSITORY / "Snakefile", folder)
    shutil.copy(Path(__file__).with_name("fake_cli.py"), folder / "src" / "circuitmill" / "cli.py")
    workflow = Workflow(folder)
    workflow.snakemake("all")
    return workflow


@pytest.fixture
def workflow(finished_workflow: Workflow, tmp_path: Path) -> Workflow:
    """A private copy of the finished workflow, times kept."""
    shutil.copytree(finished_workflow.folder, tmp_path / "w", copy_function=shutil.copy2)
    return Workflow(tmp_path / "w")
