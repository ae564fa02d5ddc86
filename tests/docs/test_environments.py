"""One set of pins: constraints.txt, from which conda files and the container take theirs."""

import re
from importlib.metadata import PackageNotFoundError, version

import yaml
from tests.conftest import REPOSITORY

PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = {normal(re.match(r"[\w.-]+", name).group()) for name in names}
    # a torch with CUDA asks for its own version of triton
    assert wanted - {"triton"} <= {normal(name) for name in PINS}
    required = "snakemake torch transformer-lens zarr numcodecs zstandard pyarrow wandb hydra-core circuit-tracer"
    assert set(required.split()) <= wanted
    assert PINS["torch"] == "2.13.0"


def test_this_environment_is_the_pinned_one():
    different = {}
    for name, pin in PINS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.split("+")[0] != pin:
            different[name] = (pin, found)
    assert not different


def test_conda_files_agree_with_the_pins():
    for path in (REPOSITORY / "envs").glob("*.yaml"):
        assert "not installed by the tests" in path.read_text().splitlines()[0]
        (pip,) = [item["pip"] for item in yaml.safe_load(path.read_text())["dependencies"] if isinstance(item, dict)]
        assert "-c ../constraints.txt" in pip and f"torch=={PINS['torch']}" in pip


def test_container_installs_from_the_pins():
    text = (REPOSITORY / "containers/Containerfile").read_text()
    assert "-c constraints.txt" in text and "ARG BASE" in text and "USER circuitmill" in text
