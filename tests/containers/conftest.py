"""The image, really built: from Debian's packages and the wheels of this environment, by buildah, without a registry.

The result is kept between calls, in $CIRCUITMILL_TEST_CACHE or ~/.cache/circuitmill-tests, by the digest of what went
into it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from envs.generate import CONTROLLER, needed, roots
from filelock import FileLock
from tests.conftest import REPOSITORY
from tests.containers.wheels import make_wheels

CACHE = Path(os.environ.get("CIRCUITMILL_TEST_CACHE", "~/.cache/circuitmill-tests")).expanduser()
BASE = CACHE / "bookworm.tar"
NAMES = sorted(needed([*roots("core"), *CONTROLLER]))
"""Normalized names of what belongs into the image besides the package."""


@dataclass(frozen=True)
class Image:
    """A finished image."""

    sif: Path
    """For apptainer."""
    environment: dict[str, str]
    """In which buildah finds it, as `circuitmill`."""


def buildah(environment: dict[str, str], *arguments: str) -> str:
    """Run buildah; returns what it printed."""
    done = subprocess.run(
        ["buildah", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


def begun(tiny_run: Path, folder: Path) -> Path:
    """Copy the checkout of the tiny run as if no stage had run but that of the embedded model; returns the folder."""
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(tiny_run / name, folder / name)
    shutil.copy(tiny_run / "Snakefile", folder)
    for name in ("config", "toyworld"):
        shutil.copytree(tiny_run / "results/tiny" / name, folder / "results/tiny" / name, copy_function=shutil.copy2)
    return folder


@pytest.fixture(scope="session")
def image() -> Image:
    """The image of this checkout."""
    for program in ("buildah", "apptainer"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; .ci/run installs it")
    if os.geteuid() != 0:
        pytest.skip("building without a daemon, in a chroot, needs root")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the base's Python is 3.11, so this environment's wheels must be")
    if not BASE.exists():
        pytest.skip("there is no base image; run tests/containers/base")
    with FileLock(CACHE / "lock"):
        return _build()


def _build() -> Image:
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(_storage()), "BUILDAH_ISOLATION": "chroot"}
    sif = CACHE / f"{_digest()}.sif"
    if sif.exists():
        return Image(sif, environment)
    pinned = hashlib.sha256("".join(f"{name}=={version(name)} " for name in NAMES).encode()).hexdigest()[:16]
    wheels = CACHE / f"wheels-{pinned}"
    if not wheels.exists():
        for old in CACHE.glob("wheels*"):
            shutil.rmtree(old)
        make_wheels(NAMES, CACHE / "wheels")
        (CACHE / "wheels").rename(wheels)
    if "localhost/base:latest" not in buildah(environment, "images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        container = buildah(environment, "from", "scratch")
        buildah(environment, "add", "--quiet", container, str(BASE), "/")
        buildah(environment, "commit", "--quiet", "--rm", container, "localhost/base")
    command = [REPOSITORY / "containers/build", "--builder", "buildah", "--base", "localhost/base", "--out", sif]
    command += ["--wheels", wheels, "--build-arg", "PIP_OPTIONS=--no-compile"]
    command += ["--squashfs", "-comp zstd -Xcompression-level 1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for old in set(CACHE.glob("*.sif")) - {sif}:
        old.unlink()
    return Image(sif, environment)


def _storage() -> Path:
    """Configuration of buildah's storage, which is kept too: after an edit of src only the last layer is made again."""
    kind = subprocess.run(
        ["stat", "--file-system", "--format", "%T", CACHE], capture_output=True, text=True, check=True
    ).stdout.strip()
    # layers cannot lie on a file system that is itself made of layers
    driver = "vfs" if kind == "overlayfs" else "overlay"
    path = CACHE / "storage.conf"
    path.write_text(f'[storage]\ndriver = "{driver}"\ngraphroot = "{CACHE}/storage"\nrunroot = "{CACHE}/storage.run"\n')
    return path


def _digest() -> str:
    """Of all files that make up the image, or that say how it is made here."""
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "src", "config", "containers", "tests/containers/wheels.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = ["pyproject.toml", "constraints.txt", *sorted(name for name in tracked if (REPOSITORY / name).is_file())]
    content = {name: hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest() for name in names}
    content["base"] = str(BASE.stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
