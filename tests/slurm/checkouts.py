"""Copies of the workflow in which runs of `demo_small` go through Slurm, and what is compared of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.numpy import load_file
from tests.conftest import REPOSITORY

RUN = "demo_small"
SHARED = ("toyworld", "tokenize", "calibrate")
"""Stages that no fault is put into."""
MACHINE = {"scheduler": "slurm", "max_mem_mb": 1900, "max_runtime": 60}
"""What its virtual nodes can give."""
SITE = MACHINE | {"partition": "gpu"}
QUICK = ["--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1"]
"""For a file system and a Slurm on this machine."""


@dataclass
class Checkout:
    """A folder like a checkout."""

    folder: Path
    run: str = RUN

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.run

    def start(self, *arguments: str, profile: str = "slurm", settings: str = "") -> "Snakemake":
        """Begin a snakemake of the run in the background; `settings` are its overrides."""
        config = [f"run={self.run}", *([f"set={settings}"] if settings else [])]
        where = ["--profile", f"profiles/{profile}", *QUICK] if profile else ["--cores", "2"]
        return Snakemake(self, [sys.executable, "-m", "snakemake", *where, *arguments, "--config", *config])

    def processes(self, *words: str) -> dict[int, list[str]]:
        """Process id -> command of those that run in this folder with all these words in their command."""
        return {
            one.pid: one.info["cmdline"]
            for one in psutil.process_iter(["cmdline", "cwd"])
            if one.info["cwd"] == str(self.folder) and set(words) <= set(one.info["cmdline"] or ())
        }

    def manifests(self, *stages: str) -> dict[str, str]:
        """Path -> text of every manifest, of some stages or of all; times are in other files."""
        found = {
            path.relative_to(self.results).as_posix(): path.read_text() for path in self.results.rglob("manifest.json")
        }
        return {path: text for path, text in found.items() if not stages or set(stages) & set(path.split("/"))}


class Snakemake:
    """A running snakemake."""

    def __init__(self, checkout: Checkout, command: list[str]) -> None:
        self.checkout, self._log = checkout, checkout.folder / "snakemake.log"
        with self._log.open("a") as file:
            self.process = subprocess.Popen(command, cwd=checkout.folder, env=environment(), stdout=file, stderr=file)

    def finish(self, seconds: int = 1800) -> str:
        """Wait for its success; what it said."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)  # it cancels its jobs and ends
            self.process.wait(60)
            raise AssertionError(f"not finished within {seconds} s:\n{self.said()}") from None
        assert code == 0, self.said()
        return self._log.read_text()

    def said(self) -> str:
        """The end of what it has said, for messages."""
        return self._log.read_text()[-20_000:]

    def until(self, condition: Callable[[], Any], what: str, seconds: int = 900, poll: float = 0.1) -> Any:
        """Wait for what is to happen while it runs; returns what the condition gives."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.said()}"
            time.sleep(poll)
        return found


def environment() -> dict[str, str]:
    """With the programs of this interpreter. Threads do not spin: many jobs share few cores here."""
    own = {key: value for key, value in os.environ.items() if key not in ("CIRCUITMILL_CONFIG", "CIRCUITMILL_SITE")}
    return own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}


def checkout(folder: Path, site: Mapping[str, Any] = SITE, *, after: Checkout | None = None) -> Checkout:
    """A new one.

    Args:
        folder: Where.
        site: Content of its site file.
        after: One that has finished, whose stages before the cache are taken over.
    """
    folder.mkdir(parents=True)
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    (folder / "profiles/slurm/site.yaml").write_text(yaml.safe_dump(dict(site)))
    made = Checkout(folder)
    if after is not None:
        for name in (*SHARED, "config"):
            shutil.copytree(after.results / name, made.results / name, copy_function=shutil.copy2)
        shutil.copytree(
            after.folder / ".snakemake/metadata", folder / ".snakemake/metadata", copy_function=shutil.copy2
        )
    return made


def copied(finished: Path, folder: Path, site: Mapping[str, Any], *removed: str) -> Checkout:
    """The finished tiny run with another site file, without the results of some stages."""
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    (folder / "profiles/slurm/site.yaml").write_text(yaml.safe_dump(MACHINE | dict(site)))
    made = Checkout(folder, "tiny")
    for name in removed:
        shutil.rmtree(made.results / name)
    return made


def same_model(one: Checkout, other: Checkout, tolerance: float = 1e-5) -> None:
    """Both trained the same values, relative to the largest of each array.

    Raises:
        AssertionError: they did not.
    """
    own, others = (made.results / "main/train/model" for made in (one, other))
    names = sorted(path.name for path in own.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in others.glob("*.safetensors"))
    for name in names:
        first, second = load_file(own / name), load_file(others / name)
        for key in first:
            apart = abs(first[key] - second[key]).max()
            assert apart <= tolerance * max(1.0, abs(first[key]).max()), (name, key, apart)


def differences(one: Checkout, other: Checkout) -> list[str]:
    """Manifests that only one has or that are not the same, byte for byte."""
    left, right = one.manifests(), other.manifests()
    return sorted(path for path in left | right if left.get(path) != right.get(path))


def what_differs(one: Checkout, other: Checkout) -> str:
    """The same with the keys that differ, for messages."""
    lines = []
    for path in differences(one, other):
        pair = [json.loads(each.manifests().get(path, "{}")) for each in (one, other)]
        keys = [key for key in pair[0] | pair[1] if pair[0].get(key) != pair[1].get(key)]
        lines.append(f"{path}: {keys}")
    return "\n".join(lines)
