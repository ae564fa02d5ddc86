"""A unit that is made again alone comes out with the same bytes, and nothing after it is touched."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from tests.workflow.conftest import Workflow
from tests.workflow.test_tiny_run import call

pytestmark = pytest.mark.slow


def state(results: Path) -> dict[str, tuple[int, str]]:
    """Time and SHA-256 of every file of a run, without snakemake's records of how jobs went."""
    return {
        path.relative_to(results).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in results.rglob("*")
        if path.is_file() and path.relative_to(results).parts[0] not in ("logs", "benchmarks")
    }


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    "unit",
    [
        "cache/shard/train-00000",
        "main/features/block/0000",
        "main/interpret/block/0000",
        "main/attribute/prompt/two_hop-00",
    ],
)
def test_a_lost_unit_is_made_alone_and_nothing_after_it_reruns(workflow: Workflow, unit: str):
    results = workflow.folder / "results/demo"
    manifest = results / unit / "manifest.json"
    before = state(results)
    manifest.unlink()
    text = workflow.snakemake(f"results/demo/{unit}/manifest.json", "--config", "run=demo")
    assert re.search(r"^total +1$", text, re.MULTILINE), text
    assert changed(before, state(results)) <= {f"{unit}/manifest.json", f"{unit}/graph.json"}
    assert manifest.stat().st_mtime_ns > before[f"{unit}/manifest.json"][0]
    assert workflow.planned("all") == {}
    assert "Nothing to be done" in workflow.snakemake("all")


def test_a_unit_that_comes_out_otherwise_reruns_what_reads_it(workflow: Workflow):
    shard = workflow.folder / "results/demo/cache/shard/train-00000/manifest.json"
    shard.write_text(shard.read_text() + " ")
    assert {"run_cache": 1, "run_train": 1}.items() <= workflow.planned("all").items()


def test_in_the_same_breath_all_that_follows_is_made_again(workflow: Workflow):
    (workflow.folder / "results/demo/cache/shard/train-00000/manifest.json").unlink()
    assert {"cache_shard": 1, "run_cache": 1, "run_train": 1}.items() <= workflow.planned("all").items()


def test_a_manifest_beyond_the_size_of_checksums_counts_as_changed(workflow: Workflow):
    shard = workflow.folder / "results/demo/cache/shard/train-00000/manifest.json"
    shard.write_bytes(shard.read_bytes())
    assert workflow.planned("all") == {}
    size = shard.stat().st_size
    assert workflow.planned("all", "--max-checksum-file-size", str(size)) == {}
    assert {"run_cache": 1}.items() <= workflow.planned("all", "--max-checksum-file-size", str(size - 1)).items()


def damaged_unit(results: Path, unit: str) -> Path:
    """Flip one bit in the middle of the largest data file of a unit."""
    files = [path for path in (results / unit).rglob("*") if path.is_file() and path.suffix != ".json"]
    path = max(files, key=lambda path: (path.stat().st_size, str(path)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("unit", ["cache/shard/train-00000", "main/features/block/0001", "main/interpret/block/0000"])
def test_a_flipped_bit_is_found_and_mended_without_touching_anything_else(tiny_run: Path, tmp_path: Path, unit: str):
    checkout = tmp_path / "c"
    shutil.copytree(tiny_run, checkout, copy_function=shutil.copy2)
    results = checkout / "results/tiny"
    before = state(results)
    damaged = damaged_unit(results, unit).relative_to(checkout)

    done = call(checkout, "circuitmill", "verify", "results/tiny")
    assert done.returncode == 1, done.stderr
    assert re.findall(r"^problem: (.*)$", done.stdout, re.MULTILINE) == [str(damaged)]
    assert done.stdout.endswith(" bytes read: 1 problems\n")
    (fix,) = re.findall(r"^  fix:      (.*)$", done.stdout, re.MULTILINE)
    mended = call(checkout, "bash", "-c", fix)
    assert mended.returncode == 0, mended.stderr
    assert re.search(r"^total +1$", mended.stdout + mended.stderr, re.MULTILINE)

    done = call(checkout, "circuitmill", "verify", "results/tiny")
    assert done.returncode == 0 and done.stdout.endswith(": all good\n"), done.stdout
    after = state(results)
    assert all(name.startswith(f"{unit}/") for name in changed(before, after)), changed(before, after)
    contents = {name: digest for name, (_, digest) in after.items() if not name.endswith("/timing.json")}
    assert contents == {name: digest for name, (_, digest) in before.items() if not name.endswith("/timing.json")}
    done = call(checkout, "snakemake", "--cores", "2", "-n", "all", "--config", "run=tiny")
    assert "Nothing to be done" in done.stdout + done.stderr
