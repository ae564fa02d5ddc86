"""The README's commands are run, its tree is the tree, its table is the list of stages."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.workflow.test_tiny_run import call

from circuitmill.pipeline import STAGES

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()
]
ELSEWHERE = (
    *("git clone", "make demo", "make test", ". .venv/bin/activate", "circuitmill serve"),
    *("circuitmill status results/gpt2", "circuitmill cancel", "circuitmill resume", "snakemake all --report"),
)
"""Set-up, the two commands that the continuous integration runs themselves, a server (tests/viz/test_serve.py), what is
for a run at work (tests/cluster, tests/slurm), and Snakemake's report (tests/workflow/test_snakemake_report.py)."""


def test_the_two_commands_are_there():
    assert "make demo" in README and "make test" in README
    for target in ("demo:", "test:"):
        assert re.search(rf"^{target}", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(ELSEWHERE)])
def test_command_runs(command: str, tiny_run: Path, tmp_path: Path):
    folder = tmp_path / "c"
    shutil.copytree(tiny_run, folder, copy_function=shutil.copy2)
    if "profiles/slurm" in command and not command.startswith("cp"):
        site = folder / "profiles/slurm/site"
        shutil.copy(site.with_suffix(".example.yaml"), site.with_suffix(".yaml"))
    words = shlex.split(command.replace("demo", "tiny"))
    if words[0] == "snakemake":
        # planning is the command's own part; that jobs run is tested once, by the run that made this folder
        run = [] if any(word.startswith("run=") for word in words) else ["run=tiny"]
        at = words.index("--config") + 1 if "--config" in words else len(words)
        words = [*words[:at], *([] if "--config" in words or not run else ["--config"]), *run, *words[at:], "-n"]
        words += ["--cores", "2"]
    done = call(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_snippet_reads_the_files_without_this_package(tiny_run: Path):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (snippet,) = (one for one in snippets if "circuitmill" not in one)
    prompts = sorted((tiny_run / "results/tiny/main/attribute/prompt").iterdir())
    snippet = snippet.replace("demo", "tiny").replace("two_hop-00", prompts[0].name)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tiny_run, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "nodes" in done.stdout


def test_table_lists_the_stages_with_their_units():
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ?(\w*) ?\|$", README, re.MULTILINE)
    assert rows == [(stage.name, stage.unit or "") for stage in STAGES]


def test_tree_names_every_folder():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert {name for name in top if f"{name}/" not in tree} == set()
    packages = {path.split("/")[2] for path in tracked if path.startswith("src/circuitmill/") and path.count("/") > 2}
    assert {name for name in packages if f"{name}/" not in tree} == set()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
