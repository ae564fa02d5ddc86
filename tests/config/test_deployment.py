import subprocess
from pathlib import Path

import pytest

from circuitmill.config.deployment import job_prefix, revisions

HERE = {"python": Path("/some where/bin/python3"), "source": Path("/a checkout/src")}


def run(prefix: str, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a job does, after Snakemake's formatting."""
    return subprocess.run(
        ["bash", "-c", prefix.format() + command],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_finds_the_interpreter_of_snakemake():
    done = run(job_prefix((), **HERE), 'echo "$PATH"; false; echo more')
    assert done.stdout == "/some where/bin:/usr/bin:/bin\n" and done.returncode == 1


def test_in_a_conda_environment_its_interpreter_stays_the_first_and_the_package_is_the_checkouts():
    done = run(job_prefix({"CONDA"}, **HERE), 'echo "$PATH"; echo "$PYTHONPATH"', PYTHONPATH="/elsewhere")
    assert done.stdout.splitlines() == ["/usr/bin:/bin", "/a checkout/src"]


def test_before_a_container_that_starts_later_the_interpreter_is_that_of_snakemake():
    done = run(job_prefix({"APPTAINER"}, **HERE), 'echo "$PATH"; env | grep ^CIRCUITMILL_REVISIONS')
    # the launcher in there compares the revisions
    assert done.stdout == f"/some where/bin:/usr/bin:/bin\nCIRCUITMILL_REVISIONS={revisions()}\n"


def test_in_a_container_of_other_code_no_job_runs():
    done = run(job_prefix({"APPTAINER"}, **HERE), "echo ran", SINGULARITY_CONTAINER="image.sif")
    assert done.returncode == 2 and not done.stdout
    assert f"expected an image with {revisions()}, found one with nothing; run containers/build" in done.stderr


@pytest.mark.parametrize("loaded", ["cuda/12.4", "gcc/13:cuda", "cuda/12.4/release:gcc/13"])
def test_a_module_is_found_by_its_name_with_and_without_version(loaded: str):
    prefix = job_prefix({"ENV_MODULES"}, modules=("cuda",), **HERE)
    assert run(prefix, "echo ran", LOADEDMODULES=loaded).stdout == "ran\n"


@pytest.mark.parametrize("environment", [{}, {"LOADEDMODULES": "cudatoolkit:gcc/cuda"}])
def test_without_one_of_its_modules_no_job_runs(environment: dict[str, str]):
    done = run(job_prefix({"ENV_MODULES"}, modules=("gcc", "cuda"), **HERE), "echo ran", **environment)
    assert done.returncode == 2 and not done.stdout
    missing = "cuda" if environment else "gcc"
    assert f"expected the module {missing}, found '{environment.get('LOADEDMODULES', '')}'" in done.stderr
    assert "correct `modules`" in done.stderr
    # modules that are named but not used are nobody's business
    assert run(job_prefix((), modules=("cuda",), **HERE), "echo ran").stdout == "ran\n"
