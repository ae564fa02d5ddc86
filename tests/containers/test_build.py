"""What containers/build asks of the builders that no test can run: podman and docker want registries."""

import os
import subprocess
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

RECORD = '#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORDED"\n'
APPTAINER = RECORD + 'for word; do case "$word" in */image.sif) echo made > "$word" ;; esac; done\n'


def build(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script with programs that only note how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"podman": RECORD, "docker": RECORD, "buildah": RECORD, "apptainer": APPTAINER}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return subprocess.run(
        [REPOSITORY / "containers/build", *arguments],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "RECORDED": str(tmp_path / "recorded")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("builder", ["podman", "docker", "buildah"])
def test_image_becomes_a_file(builder: str, tmp_path: Path):
    done = build(tmp_path, "--builder", builder, "--cuda", "--packages", "git", "--out", tmp_path / "out/x.sif")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/x.sif").read_text() == "made\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.sif"]
    made, saved, turned = (tmp_path / "recorded").read_text().splitlines()
    assert made.startswith(f"{builder} build --build-arg TORCH_INDEX= --build-arg PACKAGES=gcc libc6-dev git ")
    assert made.endswith(" -f containers/Containerfile -t circuitmill .")
    layout = "docker-archive:" if builder == "docker" else "oci:"
    assert saved.startswith(f"{builder} save -o " if builder == "docker" else f"{builder} push ")
    assert turned.startswith("apptainer build ") and f"/image.sif {layout}{tmp_path}/out/build." in turned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected --builder podman, docker or buildah, found ''"),
        (("--builder", "kaniko"), "found 'kaniko'"),
        (("--builder",), "expected a value after --builder"),
        (("--builder", "podman", "--gpu", "x"), "expected an option, found --gpu"),
        (("--builder", "docker", "--wheels", "."), "expected podman or buildah with --wheels"),
        (("--builder", "podman", "--wheels", "nowhere"), "no such folder: nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_build_nothing(arguments: tuple[str, ...], said: str, tmp_path: Path):
    done = build(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "recorded").exists()


def test_help_lists_every_option(tmp_path: Path):
    script = (REPOSITORY / "containers/build").read_text()
    options = {line.split(")")[0].strip() for line in script.splitlines() if line.startswith("    --")}
    done = build(tmp_path, "--help")
    assert done.returncode == 0 and len(options) >= 9
    assert {option for option in options if f"  {option} " not in done.stdout} == set()
