"""What a run needs on disk: the warning before it starts, and how near the figures are to what stages write."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from circuitmill.config.compose import load_run
from circuitmill.config.run import Run
from circuitmill.stages import cost_sizes
from circuitmill.stages.cost import disk_of, settings_of, short_of_disk, size_of
from circuitmill.stores.manifest import StageOutput, load_manifest

GB = 1_000_000_000
GPT2_CACHE = 41_000_960 * (2 * 12 * (768 + 24) + 16)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets the bytes that the disk has left."""

    def to(n_bytes: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**15, 0, round(n_bytes)))

    return to


def needed(run: Run, folder: Path) -> int:
    return disk_of(run, settings_of(run, folder), folder).bytes


def test_the_warning_is_there_exactly_when_it_does_not_fit(free, tmp_path: Path):
    run, folder = load_run("gpt2"), tmp_path / "results/gpt2"
    total = needed(run, folder)
    assert GPT2_CACHE < total < 1.2 * GPT2_CACHE
    free(total)
    assert short_of_disk(run, folder) is None
    free(total - 1)
    text = short_of_disk(run, folder)
    assert text is not None and text.startswith("847 GB are still to be stored, 847 GB are free")
    assert f"({tmp_path}): 1 B too little" in text


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.1])
@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "crosscoder-base-vs-chat", "demo"])
def test_what_the_warning_proposes_fits(name: str, share: float, free, tmp_path: Path):
    run = load_run(name)
    total = needed(run, tmp_path / name)
    free(share * total)
    text = short_of_disk(run, tmp_path / name)
    assert text is not None
    proposed = [line.strip() for line in text.splitlines()[1:]]
    for line in proposed:
        overrides, _, rest = line.rpartition(" (")
        changed = load_run(name, overrides.split(" "))
        assert short_of_disk(changed, tmp_path / name) is None, line
        assert cost_sizes.size(needed(changed, tmp_path / name)) == rest.removesuffix(" in all)")
    if not proposed:
        assert "No codec and no mode of the cache is enough" in text
        smallest = load_run(name, ["cache.mode=stream", "train.keep_checkpoints=1"])
        assert needed(smallest, tmp_path / name) > 0.8 * share * total


def test_the_finest_codec_that_fits_is_proposed(free, tmp_path: Path):
    run = load_run("gpt2")
    free(600 * GB)
    text = short_of_disk(run, tmp_path / "gpt2") or ""
    lines = [line.split(" (")[0].strip() for line in text.splitlines()[1:]]
    assert lines == ["cache.codec=int4", "cache.targets=recomputed", "cache.mode=stream"]
    free(300 * GB)
    text = short_of_disk(run, tmp_path / "gpt2") or ""
    assert [line.split(" (")[0].strip() for line in text.splitlines()[1:]] == ["cache.codec=int2", "cache.mode=stream"]
    # neither of both alone
    free(200 * GB)
    text = short_of_disk(run, tmp_path / "gpt2") or ""
    lines = [line.split(" (")[0].strip() for line in text.splitlines()[1:]]
    assert lines == ["cache.targets=recomputed cache.codec=int2", "cache.mode=stream"]


def test_what_variants_set_themselves_is_not_proposed(free, tmp_path: Path):
    run = load_run("demo", ["+variants={fine:['cache.codec=bf16'],coarse:['cache.codec=int4']}"])
    assert len(run.stages["cache"]) == 2
    free(needed(run, tmp_path) - 1)
    text = short_of_disk(run, tmp_path) or ""
    assert "cache.codec" not in text and "cache.targets=recomputed" in text


def finish(run: Run, stage: str, folder: Path, counts: dict, unit: str | None = None, n_bytes: int = 10) -> None:
    output = StageOutput(stage, run.config(stage), {}, folder, unit=unit, keep=("shard",))
    output.path("data").write_bytes(bytes(n_bytes))
    output.finish(counts)


def test_shards_that_are_there_are_not_needed_again(free, tmp_path: Path):
    run = load_run("demo")
    shards = settings_of(run, tmp_path)["main"].shards()
    of_shard = {name: (tokens or 0) * (2 * 4 * 132 + 16) for name, tokens in shards.items()}
    before = needed(run, tmp_path)
    for index, name in enumerate(list(shards)[:3]):
        finish(run, "cache", tmp_path / "cache/shard" / name, {}, unit=name)
        free(before - 1 - sum(list(of_shard.values())[: index + 1]))
        assert (short_of_disk(run, tmp_path) or "").count("1 B too little") == 1
    # one that is being written has some of its bytes
    partial = tmp_path / "cache/shard/train-00003"
    partial.mkdir()
    (partial / "data").write_bytes(bytes(1000))
    free(before - 1000 - sum(list(of_shard.values())[:3]))
    assert short_of_disk(run, tmp_path) is None
    # with another codec they are made anew, in the place of what is there
    coarser = load_run("demo", ["cache.codec=int4"])
    there = disk_of(coarser, settings_of(coarser, tmp_path), tmp_path)
    assert there.bytes - there.left < 1000 + 3 * 3000
    # the gathered cache is all there
    finish(run, "cache", tmp_path / "cache", {})
    disk = disk_of(run, settings_of(run, tmp_path), tmp_path)
    assert {each.stage: each.left for each in disk.stored}["cache"] == 0


def test_a_limit_counts_what_is_there(tmp_path: Path):
    run = load_run("demo")
    settings = settings_of(run, tmp_path)
    finish(run, "cache", tmp_path / "cache", {})
    disk = disk_of(run, settings, tmp_path, limit=2 * GB)
    cache = next(each for each in disk.stored if each.stage == "cache")
    assert cache.left == 0 and disk.free == 2 * GB - (cache.bytes or 0) and disk.where == "--disk"


def test_what_is_not_known_is_not_warned_of_until_a_stage_has_seen_it(free, tmp_path: Path):
    run = load_run("gpt2", ["model.name=somebody/else"])
    free(2 * GB)
    assert short_of_disk(run, tmp_path) is None
    assert disk_of(run, settings_of(run, tmp_path), tmp_path).unknown == ["cache", "train", "features"]
    finish(run, "calibrate", tmp_path / "calibrate", {"n_layers": 12, "d_model": 768})
    assert needed(run, tmp_path) == needed(load_run("gpt2"), tmp_path)
    assert "cache.mode=stream" not in (short_of_disk(run, tmp_path) or "")


def test_the_token_store_says_how_much_text_there_is(tmp_path: Path):
    run = load_run("demo")
    before = settings_of(run, tmp_path)["main"]
    finish(run, "tokenize", tmp_path / "tokenize", {"sequences": {"train": 20_000, "heldout": 500}})
    after = settings_of(run, tmp_path)["main"]
    assert before.about and not after.about
    assert after.cached("heldout") == 32_000 and after.cached("train") == 1_200_000
    # of another text it says nothing
    other = load_run("demo", ["tokenize.context=32"])
    assert settings_of(other, tmp_path)["main"].about


def test_asking_loads_neither_torch_nor_what_stages_need(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from circuitmill.config.compose import load_run\n"
        "from circuitmill.stages.cost import short_of_disk\n"
        "short_of_disk(load_run('demo'), Path('results/demo'))\n"
        "print([name for name in ('torch', 'numpy', 'zarr', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_sizes_are_near_what_stages_write(tiny_run: Path):
    """At this size heads of files and metadata are a good part of everything; of large runs they are nothing."""
    run, folder = load_run("tiny"), tiny_run / "results/tiny"
    setting = settings_of(run, folder)["main"]

    def written(stage: str) -> int:
        return sum(entry["bytes"] for entry in load_manifest(folder / stage / "manifest.json").files.values())

    counts = load_manifest(folder / "cache/manifest.json").counts
    # all tokens but BOS, of which this corpus has one in twelve
    without_bos = sum(counts["tokens"].values()) / 5120
    assert without_bos * (size_of("cache", setting) or 0) == pytest.approx(counts["bytes"], rel=0.03)
    planned = {stage: size_of(stage, setting) or 0 for stage in ("tokenize", "train", "features")}
    # numbers and text before compression
    assert 0.4 * planned["tokenize"] < written("tokenize") < planned["tokenize"]
    blocks = [f"features/block/{name}" for name in ("0000", "0001")]
    assert 0.3 * planned["features"] < sum(written(f"main/{block}") for block in blocks) < planned["features"]
    # two checkpoints; the third is there only while it is written
    checkpoints = list((folder / "main/train/checkpoints").rglob("*.safetensors"))
    one = cost_sizes.checkpoint_bytes(setting.configs["train"], 2, 32)
    assert len(checkpoints) == 2 and planned["train"] == 3 * one
    assert all(one < path.stat().st_size < one + 12_000 for path in checkpoints)


@pytest.mark.slow
def test_a_finished_run_needs_nothing_more(tiny_run: Path):
    run, folder = load_run("tiny"), tiny_run / "results/tiny"
    assert disk_of(run, settings_of(run, folder), folder).left == 0
    manifest = json.loads((folder / "cache/manifest.json").read_text())
    assert manifest["config"]["codec"] == "int8"
    coarser = load_run("tiny", ["cache.codec=int4"])
    assert disk_of(coarser, settings_of(coarser, folder), folder).left == 0
    finer = load_run("tiny", ["cache.codec=float32"])
    assert disk_of(finer, settings_of(finer, folder), folder).left > 1_000_000
