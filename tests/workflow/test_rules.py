"""Rules are prose: thin, documented, logged, measured, and started through the command line alone."""

import re
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

from circuitmill.pipeline import STAGES

FILES = sorted((REPOSITORY / "workflow/rules").glob("*.smk"))
RULES = [
    (path.name, name, body)
    for path in FILES
    for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n|\n)+)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("file", "name", "body"), RULES, ids=[rule[1] for rule in RULES])
def test_rule_is_documented_logged_and_measured(file: str, name: str, body: str):
    assert body.lstrip().startswith('"""')
    for directive in ("output", "log", "benchmark", "threads", "resources", "params", "shell"):
        assert re.search(rf"^    {directive}:", body, re.MULTILINE), directive
    assert not re.search(r"^    (script|run|notebook|wrapper):", body, re.MULTILINE)
    assert len(body.splitlines()) <= 45
    if name != "configure":
        assert "manifest=" in body and "revision=" in body and "config=frozen(" in body
        assert re.search(r"^    conda:", body, re.MULTILINE)
        assert re.search(r"^    envmodules:\n        \*modules\(\),", body, re.MULTILINE)
        assert f'threads: cpus("{name}"' in body and f'**asks("{name}", mem_mb=' in body
        assert re.search(r'shell:\n\s+"(\{params\.srun\} )?python -m circuitmill ', body)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_file_opens_with_its_inputs_and_outputs(path: Path):
    head = path.read_text().split('"""')[1]
    if path.stem != "common":
        assert "Outputs:" in head and "results/<run>/" in head
    assert len(path.read_text().splitlines()) <= 120


def test_units_have_two_rules_and_the_others_one():
    names = [name for _, name, _ in RULES]
    expected = ["configure"]
    for stage in STAGES:
        expected += [f"{stage.name}_{stage.unit}"] * bool(stage.unit) + [f"run_{stage.name}"]
    assert sorted(names) == sorted(expected)


def test_snakefile_is_a_table_of_contents():
    text = (REPOSITORY / "Snakefile").read_text()
    assert len(text.splitlines()) <= 80
    includes = re.findall(r'include: "workflow/rules/(\w+)\.smk"', text)
    assert includes == ["common", "where", "configure", *(stage.name for stage in STAGES)]


def test_train_always_goes_through_the_launcher():
    body = next(body for _, name, body in RULES if name == "run_train")
    assert '"{params.srun} python -m circuitmill launch --per-node {params.ranks} --threads {threads} train' in body
