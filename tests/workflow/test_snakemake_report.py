"""`snakemake --report` of a finished run: what it shows, with captions, and that it leaves the run alone."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.workflow.test_tiny_run import call

pytestmark = pytest.mark.slow
RULES = "".join(path.read_text() for path in sorted((REPOSITORY / "workflow/rules").glob("*.smk")))


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "c"
    shutil.copytree(tiny_run, folder, copy_function=shutil.copy2)
    return folder


@pytest.fixture(scope="module")
def archive(run: Path) -> dict[str, str]:
    """Files of the report by name."""
    # where it may be done, without a network of any kind
    alone = ("unshare", "--map-root-user", "--net")
    offline = alone if shutil.which("unshare") and call(run, *alone, "true").returncode == 0 else ()
    done = call(run, *offline, "snakemake", "all", "--config", "run=tiny", "--report", "report.zip")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(run / "report.zip") as opened:
        return {name: opened.read(name).decode(errors="replace") for name in opened.namelist()}


def test_it_holds_figures_tables_and_graphs(archive: dict[str, str], run: Path):
    names = sorted(Path(name).name for name in archive)
    prompts = list((run / "results/tiny/main/attribute/prompt").iterdir())
    assert len(prompts) == 3
    expected = ["density.svg", "explained_variance.svg", "l0.svg", "report.html", "tables.html"]
    assert names == sorted(expected + ["graph.json"] * len(prompts))
    made = (run / "results/tiny/main/report/tables.html").read_text()
    assert next(text for name, text in archive.items() if name.endswith("tables.html")) == made


def test_everything_has_a_caption_and_belongs_to_a_stage(archive: dict[str, str]):
    page = archive["report/report.html"]
    for words in (
        "circuitmill: run tiny",
        "Explained variance of the MLP outputs of each layer",
        "How often features fire, variant main",
        "Headline figures of variant main",
        "format; the graph viewer of the run's page",
    ):
        assert words in page.replace("\\n", " ").replace("\\u0027", "'"), words
    for stage in ("evaluate", "attribute", "report"):
        assert f'"{stage}"' in page


def test_every_caption_is_used():
    captions = {path.stem for path in (REPOSITORY / "workflow/report").glob("*.rst")} - {"workflow"}
    shown = set(re.findall(r'shown\("\w+", f".*/(\w+)\.\w+"', RULES))
    assert captions == shown
    assert re.search(r'^report: "workflow/report/workflow.rst"$', (REPOSITORY / "Snakefile").read_text(), re.MULTILINE)


def test_a_touched_run_has_nothing_to_do(run: Path):
    # as after a copy that kept neither times nor what Snakemake had noted
    shutil.rmtree(run / ".snakemake/metadata")
    for place, path in enumerate(sorted((run / "results").rglob("manifest.json"), reverse=True)):
        os.utime(path, (1e9 + place, 1e9 + place))
    command = ("snakemake", "all", "--config", "run=tiny")
    assert "run_train" in call(run, *command, "-n").stdout
    assert call(run, *command, "--cores", "1", "--touch").returncode == 0
    assert "Nothing to be done" in call(run, *command, "-n").stdout
    assert call(run, "circuitmill", "verify", "results/tiny").stdout.endswith(": all good\n")
