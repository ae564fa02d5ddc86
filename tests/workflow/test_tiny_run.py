"""The whole workflow with its real stages, at the smallest sizes, and what happens when its files are damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from circuitmill import pipeline
from circuitmill.pipeline import STAGES
from circuitmill.stores.manifest import load_manifest

pytestmark = pytest.mark.slow


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in a folder."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A private copy of the finished run, times kept."""
    shutil.copytree(tiny_run, tmp_path / "c", copy_function=shutil.copy2)
    return tmp_path / "c"


def stage_command(stage: str, *extra: str, out: str = "elsewhere") -> list[str]:
    """The command that the workflow runs for a stage of the tiny run."""
    row = next(row for row in STAGES if row.name == stage)
    home = lambda name: f"results/tiny/{'' if pipeline.stage(name).shared else 'main/'}"  # noqa: E731
    command = ["circuitmill", stage, "--config", f"{home(stage)}config/{stage}.yaml"]
    for name in row.upstream:
        command += [f"--{name}", f"{home(name)}{name}/manifest.json"]
    return [*command, *extra, "--out", out]


def test_every_manifest_is_there_and_every_byte_is_as_it_says(tiny_run: Path):
    done = call(tiny_run, "circuitmill", "verify", "results/tiny")
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        home = tiny_run / "results/tiny" / ("" if stage.shared else "main") / stage.name
        manifest = load_manifest(home / "manifest.json", stage.name)
        assert set(manifest.inputs) >= set(stage.upstream)
        assert manifest.counts and manifest.files


def test_the_second_run_does_nothing(tiny_run: Path):
    done = call(tiny_run, "snakemake", "--cores", "2", "all", "--config", "run=tiny")
    assert "Nothing to be done" in done.stdout + done.stderr


def test_one_deleted_graph_is_rebuilt_alone_and_alike(run: Path):
    prompts = sorted((run / "results/tiny/main/attribute/prompt").iterdir())
    before = {path.name: (path / "graph.json").read_bytes() for path in prompts}
    shutil.rmtree(prompts[0])
    done = call(run, "snakemake", "--cores", "2", "all", "--config", "run=tiny")
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
    assert jobs == {"all": "1", "attribute_prompt": "1", "run_attribute": "1", "run_report": "1", "total": "4"}
    assert {path.name: (path / "graph.json").read_bytes() for path in prompts} == before


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with a message of ours that holds these words, not with a traceback."""
    assert done.returncode in (1, 2), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_missing_upstream(run: Path):
    (run / "results/tiny/cache/manifest.json").unlink()
    refused(call(run, *stage_command("train")), "UpstreamError", "cache/manifest.json", "no such file")


def test_manifest_of_another_revision(run: Path):
    path = run / "results/tiny/cache/manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "revision": raw["revision"] + 1}))
    refused(call(run, *stage_command("train")), "UpstreamError", "revision")


def test_flipped_byte_in_a_chunk(run: Path):
    shard = run / "results/tiny/cache/shard/train-00000/activations.zarr/inputs/codes"
    chunk = max((path for path in shard.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 0x10
    chunk.write_bytes(bytes(data))
    earlier = (run / "results/tiny/main/train/manifest.json").read_bytes()
    refused(call(run, *stage_command("train")), "StoreError", "train-00000", "inputs/codes")
    assert (run / "results/tiny/main/train/manifest.json").read_bytes() == earlier


def test_truncated_shard(run: Path):
    shard = run / "results/tiny/cache/shard/train-00000/activations.zarr/outputs/codes"
    chunk = max((path for path in shard.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-100])
    refused(call(run, *stage_command("train")), "train-00000", "outputs/codes")


def test_prompt_longer_than_the_context(run: Path):
    text = "the state of Texas " * 60
    config = run / "results/tiny/main/config/attribute.yaml"
    import yaml

    options = yaml.safe_load(config.read_text())
    options["prompts"] = {"long": text}
    config.write_text(yaml.safe_dump(options))
    refused(call(run, *stage_command("attribute", "--prompt", "long")), "long", "context")


def test_wrong_key(run: Path):
    given = ["--tokenize", "x", "--cache", "x", "--out", "elsewhere"]
    done = call(run, "circuitmill", "train", "experiment=tiny", "train.lrr=1", *given)
    refused(done, "ConfigError", "lrr")
    assert done.returncode == 2 and not (run / "elsewhere").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ("corpus.txt", "0 bytes")), (b"good line\nbad \xff\xfe line\n", ("corpus.txt", "UTF-8"))],
    ids=["empty", "not UTF-8"],
)
def test_bad_corpus_file(run: Path, content: bytes, words: tuple[str, ...]):
    (run / "corpus.txt").write_bytes(content)
    command = ["circuitmill", "tokenize", "experiment=tiny", "tokenize=files", "tokenize.files=[corpus.txt]"]
    command += ["tokenize.context=32", "--toyworld", "results/tiny/toyworld/manifest.json", "--out", "elsewhere"]
    refused(call(run, *command), "StoreError", *words)
