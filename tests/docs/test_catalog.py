"""What the entry for the Snakemake workflow catalog says is there."""

import re

import yaml
from snakemake.cli import get_argument_parser
from tests.conftest import REPOSITORY

USAGE = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
DEPLOYMENT = USAGE["software-stack-deployment"]
SNAKEFILE = (REPOSITORY / "Snakefile").read_text()
RULES = {path.name: path.read_text() for path in (REPOSITORY / "workflow/rules").glob("*.smk")}
COMMON = ("common.smk", "where.smk", "configure.smk")
"""Files without a rule that computes anything."""


def test_keys_are_those_that_the_catalog_reads():
    assert set(USAGE) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(USAGE["mandatory-flags"]) == {"desc", "flags"}
    assert set(DEPLOYMENT) == {"conda", "apptainer", "apptainer+conda"}
    assert all(isinstance(value, bool) for value in DEPLOYMENT.values())
    # tests/workflow/test_snakemake_report.py makes one
    assert USAGE["report"] is True
    assert (REPOSITORY / "config/README.md").is_file()


def test_what_it_names_exists():
    text = USAGE["mandatory-flags"]["desc"]
    for path in re.findall(r"\b(?:profiles|config)/[\w/.-]+\w", text):
        assert (REPOSITORY / path).exists(), path
    (run,) = re.findall(r"run=([\w.-]+\w)", text)
    assert (REPOSITORY / f"config/experiment/{run}.yaml").is_file()
    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    flags = {*re.findall(r"--[\w-]+", text), *USAGE["mandatory-flags"]["flags"]}
    assert flags and flags <= known


def test_every_rule_has_an_environment_and_all_have_an_image():
    assert DEPLOYMENT["conda"] and DEPLOYMENT["apptainer"]
    for name, text in RULES.items():
        rules = len(re.findall(r"^rule \w+:", text, re.MULTILINE))
        environments = re.findall(r'^    conda:\n        "\.\./\.\./(envs/\w+\.yaml)"', text, re.MULTILINE)
        assert len(environments) == (0 if name in COMMON else rules), name
        assert all((REPOSITORY / path).is_file() for path in environments)
    assert re.search(r"^container:", SNAKEFILE, re.MULTILINE)
    assert (REPOSITORY / "containers/Containerfile").is_file()
