"""One set of pins: constraints.txt, from which conda files and the container take theirs."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from envs.generate import PURPOSE, conda_file, lock, needed, roots
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.conftest import REPOSITORY

CONTAINERFILE = (REPOSITORY / "containers/Containerfile").read_text()


def test_all_that_is_needed_is_pinned():
    # what torch needs, it names with exact versions itself; with CUDA that is more
    with_torch = {canonicalize_name(Requirement(text).name) for text in requires("torch") or ()}
    assert needed(roots("dev")) - lock().keys() - {"triton"} <= with_torch
    wanted = "snakemake torch transformer-lens zarr numcodecs zstandard pyarrow wandb hydra-core circuit-tracer"
    assert set(wanted.split()) <= lock().keys()
    assert lock()["torch"] == "torch==2.13.0"


def test_nothing_else_is_pinned():
    assert lock().keys() - needed(roots("dev")) == set()


def test_this_environment_is_the_pinned_one():
    different = {}
    for name, line in lock().items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if f"{line.split('==')[0]}=={found.split('+')[0]}" != line:
            different[line] = found
    assert not different


@pytest.mark.parametrize("family", PURPOSE)
def test_conda_file_agrees_with_the_pins(family: str, request: pytest.FixtureRequest):
    path, text = REPOSITORY / f"envs/{family}.yaml", conda_file(family)
    if request.config.getoption("--fix"):
        path.write_text(text)
    assert path.read_text() == text, "run `python -m envs.generate`"
    # a path would be looked for where Snakemake keeps its copy of the file
    assert not re.search(r"^ +- (-|.*/)", text, re.MULTILINE)


def test_every_rule_names_the_conda_file_of_its_family():
    for path in (REPOSITORY / "workflow/rules").glob("*.smk"):
        named = set(re.findall(r"conda:\s+\"\.\./\.\./envs/(\w+)\.yaml\"", path.read_text()))
        assert named <= {"interpret" if path.stem == "interpret" else "core"}, path.name


def test_container_installs_from_the_pins():
    assert "PIP_CONSTRAINT=/opt/circuitmill/constraints.txt" in CONTAINERFILE
    installs = [line for line in CONTAINERFILE.splitlines() if "pip install" in line and not line.startswith("#")]
    assert len(installs) == 3 and "[dev]" not in CONTAINERFILE


def test_the_builder_is_sent_what_the_container_copies():
    sent = (REPOSITORY / ".containerignore").read_text()
    assert sent == (REPOSITORY / ".dockerignore").read_text()
    again = set(re.findall(r"^!(\S+)$", sent, re.MULTILINE))
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", CONTAINERFILE, re.MULTILINE) for word in line.split()}
    assert sent.splitlines()[1] == "*" and again == copied
