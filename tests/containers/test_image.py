"""The image holds what is pinned and nothing else, and its stages give what they give outside."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from envs.generate import canonicalize_name, lock
from tests.conftest import REPOSITORY
from tests.containers.conftest import NAMES, Image, begun, buildah

from circuitmill.config import deployment
from circuitmill.stores.manifest import Manifest, load_manifest

pytestmark = pytest.mark.slow

TRAP = "#!/bin/sh\necho an interpreter of the host was started in the container >&2\nexit 9\n"
CACHES = ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "WANDB_CACHE_DIR")


def inside(image: Image, *command: str, options: tuple[str, ...] = ("--no-home",)) -> str:
    """Run a command in the image with nothing of the machine but what the options name; returns what it prints."""
    done = subprocess.run(
        ["apptainer", "exec", "--containall", *options, str(image.sif), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_installed_is_what_is_pinned(image: Image):
    found = json.loads(inside(image, "python", "-m", "pip", "list", "--format", "json"))
    versions = {canonicalize_name(one["name"]): one["version"].split("+")[0] for one in found}
    pinned = {name: line.split("==")[1] for name, line in lock().items()}
    # pip comes with the virtual environment; what torch needs besides it names itself
    own = {"pip", "circuitmill"} | ({"setuptools"} - pinned.keys())
    assert versions.keys() - own == set(NAMES) - own
    assert {name: found for name, found in versions.items() if name not in own and found != pinned[name]} == {}


def test_programs_are_on_the_path_and_say_what_they_are(image: Image):
    printed = inside(image, "bash", "-c", "type -P python snakemake circuitmill; cat /opt/circuitmill/revisions")
    *programs, revisions = printed.splitlines()
    assert programs == [f"/opt/venv/bin/{name}" for name in ("python", "snakemake", "circuitmill")]
    assert revisions == deployment.revisions()
    assert inside(image, "circuitmill", "--version").split()[-1] == revisions.split()[0]
    assert "train of run demo" in inside(image, "circuitmill", "config", "experiment=demo", "--stage", "train")


MADE = f"import os, pathlib; [pathlib.Path(os.environ[k], 'x').mkdir(parents=True) for k in {CACHES}]"


def test_caches_lie_below_a_folder_that_is_mounted(image: Image, tmp_path: Path):
    inside(image, "python", "-c", MADE, options=("--no-home", "--bind", f"{tmp_path}:/cache"))
    assert len(list(tmp_path.rglob("x"))) == len(CACHES)


def test_caches_lie_in_the_home_folder_where_none_is_mounted(image: Image, tmp_path: Path):
    home, own = tmp_path / "home", tmp_path / "own"
    home.mkdir()
    own.mkdir()
    options = ("--home", str(home), "--bind", str(own), "--env", f"HF_HOME={own}")
    inside(image, "python", "-c", MADE, options=options)
    assert (own / "x").is_dir()
    assert len(list((home / ".cache/circuitmill").rglob("x"))) == len(CACHES) - 1


def test_any_user_may_run_it_and_the_default_is_not_root(image: Image):
    configured = json.loads(buildah(image.environment, "inspect", "--type", "image", "circuitmill"))["OCIv1"]["config"]
    assert configured["User"] == "circuitmill"
    container = buildah(image.environment, "from", "circuitmill")
    try:
        as_it_is = ("run", container, "--", "sh", "-c", "id -u; mkdir -p $HF_HOME; echo > $HOME/x")
        assert int(buildah(image.environment, *as_it_is)) > 0
        # an id that no file of users knows: no name, no home
        program = (
            "import os, torch, matplotlib.pyplot as plt, circuitmill.stages.train; print(os.getuid()); plt.figure()"
        )
        other = ("run", "--user", "4321:4321", container, "--", "python", "-W", "error::UserWarning", "-c", program)
        assert buildah(image.environment, *other) == "4321"
    finally:
        buildah(image.environment, "rm", container)


@pytest.fixture
def checkout(image: Image, tiny_run: Path, tmp_path: Path) -> Path:
    """A checkout in which the embedded model is there and nothing after it, with a virtual environment below it.

    Its interpreter runs snakemake here; by the name that jobs start, it is a trap.
    """
    folder = begun(tiny_run, tmp_path / "checkout")
    (folder / "containers").mkdir()
    (folder / "containers/circuitmill.sif").symlink_to(image.sif)
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    packages = folder / ".venv/lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (programs / "python3").symlink_to(Path(sys.executable).resolve())
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    here = Path(pytest.__file__).parents[1]
    (packages / "here.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n")
    (programs / "python").write_text(TRAP)
    (programs / "python").chmod(0o755)
    return folder


def snakemake(checkout: Path, *targets: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run jobs in the container, with no more options than it takes."""
    command = [".venv/bin/python3", "-m", "snakemake", "--cores", "2", *targets, "--config", "run=tiny"]
    command += ["--software-deployment-method", "apptainer"]
    return subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def manifests(checkout: Path) -> dict[str, Manifest]:
    """The manifests up to and with train's, by their folders."""
    run = checkout / "results/tiny"
    folders = [run / "tokenize", run / "calibrate", *(run / "cache/shard").iterdir(), run / "cache", run / "main/train"]
    return {str(folder.relative_to(run)): load_manifest(folder / "manifest.json") for folder in folders}


def test_stages_give_in_the_image_what_they_give_outside(checkout: Path, tiny_run: Path):
    done = snakemake(checkout, "train")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", printed, re.MULTILINE))
    assert "run_toyworld" not in jobs and {"run_tokenize", "cache_shard", "run_cache", "run_train"} <= jobs.keys()
    assert printed.count("Activating singularity image") >= int(jobs["total"]) - 1
    here, there = manifests(tiny_run), manifests(checkout)
    assert here.keys() == there.keys() and len(there) >= 6
    for name, manifest in there.items():
        assert manifest.digest == here[name].digest, name
        manifest.verify()


def test_an_image_of_other_code_is_refused(checkout: Path):
    shutil.copytree(REPOSITORY / "src", checkout / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    rows = checkout / "src/circuitmill/pipeline.py"
    rows.write_text(rows.read_text().replace('Stage("tokenize",', 'Stage("tokenize", revision=1000, upstream='))
    assert "revision=1000" in rows.read_text()
    done = snakemake(checkout, "tokenize", PYTHONPATH=str(checkout / "src"))
    assert done.returncode != 0
    assert "containers/build" in done.stderr and "tokenize:1000" in done.stderr, done.stderr
    assert not (checkout / "results/tiny/tokenize/manifest.json").exists()
