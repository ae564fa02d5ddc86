"""Manifests: written last, checked first, and continued only when they belong to the same work."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from circuitmill.errors import StoreError, UpstreamError
from circuitmill.stores.files import sha256_file
from circuitmill.stores.manifest import NAME, TIMING, StageOutput, load_manifest, load_upstreams
from circuitmill.stores.verify import verify


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 1
    names: tuple[str, ...] = ("a",)


def write(folder: Path, stage: str = "tokenize", cfg: object = None, inputs: dict | None = None, text: str = "data"):
    output = StageOutput(stage, cfg or Config(), inputs or {}, folder)
    output.path("sub", "data.txt").write_text(text)
    return output.finish({"n": 3})


def test_round_trip(tmp_path: Path):
    written = write(tmp_path / "t")
    read = load_manifest(tmp_path / "t" / NAME, "tokenize")
    assert read.digest == written.digest and read.counts == {"n": 3}
    assert read.config == {"size": 1, "names": ["a"]}
    assert read.files == {"sub/data.txt": {"bytes": 4, "sha256": sha256_file(tmp_path / "t" / "sub" / "data.txt")}}
    assert read.file("sub/data.txt").read_text() == "data"
    read.verify()


def test_same_work_same_digest_and_other_data_other_digest(tmp_path: Path):
    one, two = write(tmp_path / "a"), write(tmp_path / "b")
    assert one.digest == two.digest
    assert write(tmp_path / "c", text="dato").digest != one.digest
    assert write(tmp_path / "d", cfg=Config(2)).digest != one.digest


def test_the_same_work_leaves_the_same_manifest_and_its_own_times(tmp_path: Path):
    one, two = (
        StageOutput("tokenize", Config(), {}, tmp_path / "a"),
        StageOutput("tokenize", Config(), {}, tmp_path / "b"),
    )
    for output in (one, two):
        output.path("data.txt").write_text("data")
    first = one.finish({"n": 3})
    time.sleep(0.02)
    second = two.finish({"n": 3})
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    assert set(first.files) == {"data.txt"}
    assert second.wall_seconds > first.wall_seconds > 0 and second.peak_memory_bytes > 1e6
    loaded = load_manifest(tmp_path / "b" / NAME)
    assert (loaded.wall_seconds, loaded.peak_memory_bytes) == (second.wall_seconds, second.peak_memory_bytes)
    raw = json.loads((tmp_path / "b" / TIMING).read_text())
    assert raw == {
        "wall_seconds": second.wall_seconds,
        "peak_memory_bytes": second.peak_memory_bytes,
        "cpu_seconds": second.cpu_seconds,
        "device": "cpu",
        "ranks": 1,
        "continued": False,
    }


def test_times_say_that_an_earlier_run_had_begun_and_on_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    StageOutput("tokenize", Config(), {}, tmp_path).ledger.put("file-0")
    assert write(tmp_path).continued and load_manifest(tmp_path / NAME).continued
    gpu = SimpleNamespace(is_initialized=lambda: True, get_device_name=lambda: "NVIDIA H200")
    ranks = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 4)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu, distributed=ranks))
    write(tmp_path)
    found = load_manifest(tmp_path / NAME)
    assert (found.device, found.ranks, found.continued) == ("NVIDIA H200", 4, False)
    monkeypatch.delitem(sys.modules, "torch")
    assert (write(tmp_path).device, write(tmp_path).ranks) == ("cpu", 1)


def test_times_of_an_earlier_version_do_not_say_on_what(tmp_path: Path):
    write(tmp_path)
    (tmp_path / TIMING).write_text('{"wall_seconds": 2.5, "peak_memory_bytes": 7}')
    found = load_manifest(tmp_path / NAME)
    assert (found.wall_seconds, found.device, found.ranks, found.continued) == (2.5, "", 1, False)


def test_volatile_files_are_named_but_no_digest_depends_on_them(tmp_path: Path):
    made = []
    for name, text in (("a", "12 s"), ("b", "13 s")):
        output = StageOutput("tokenize", Config(), {}, tmp_path / name, volatile=("sub/times.txt",))
        output.path("data.txt").write_text("data")
        output.path("sub", "times.txt").write_text(text)
        made.append(output.finish({"n": 3}))
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    found = load_manifest(tmp_path / "b" / NAME)
    assert (found.volatile, list(found.files)) == (("sub/times.txt",), ["data.txt"]) and found.digest == made[0].digest
    assert found.file("sub/times.txt").read_text() == "13 s"
    assert verify(tmp_path).findings == ()
    (tmp_path / "b" / "sub" / "times.txt").unlink()
    load_manifest(tmp_path / "b" / NAME).verify()


def test_times_are_written_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []
    monkeypatch.setattr("circuitmill.stores.manifest.atomic_write", lambda path, text: written.append(path.name))
    write(tmp_path)
    assert written == [TIMING, NAME]


def test_without_times_they_are_zero_and_unreadable_ones_are_refused(tmp_path: Path):
    write(tmp_path)
    (tmp_path / TIMING).unlink()
    loaded = load_manifest(tmp_path / NAME)
    assert (loaded.wall_seconds, loaded.peak_memory_bytes) == (0, 0)
    for text in ("{", "[]", '{"wall_seconds": 1}', '{"wall_seconds": NaN, "peak_memory_bytes": 1}'):
        (tmp_path / TIMING).write_text(text)
        with pytest.raises(UpstreamError, match=r"two numbers(.|\n)*timing.json(.|\n)*fix: +delete"):
            load_manifest(tmp_path / NAME)


def test_a_manifest_of_an_earlier_version_keeps_its_digest_and_the_times_inside_it(tmp_path: Path):
    written = write(tmp_path)
    (tmp_path / TIMING).unlink()
    raw = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**raw, "wall_seconds": 12.5, "peak_memory_bytes": 99}))
    loaded = load_manifest(tmp_path / NAME)
    assert (loaded.digest, loaded.wall_seconds, loaded.peak_memory_bytes) == (written.digest, 12.5, 99)


def test_missing_names_the_stage_to_run(tmp_path: Path):
    with pytest.raises(UpstreamError, match=r"manifest of stage tokenize; found no such file(.|\n)*snakemake tokenize"):
        load_manifest(tmp_path / NAME, "tokenize")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(revision=99), "revision 1 of stage tokenize; found revision 99"),
        (lambda raw: raw.update(format_version=99), "manifest format version 1; found version 99"),
        (lambda raw: raw.update(stage="cache"), "manifest of stage tokenize; found stage cache"),
        (lambda raw: raw["counts"].update(n=4), "matches its own digest; found an edited one"),
        (lambda raw: raw.pop("files"), "a complete manifest; found KeyError"),
        (lambda raw: raw["files"].update(x={}), "a complete manifest; found KeyError"),
        (lambda raw: raw["counts"].update(n=float("nan")), "a complete manifest; found ValueError: NaN"),
    ],
)
def test_refuses_what_is_not_the_expected_manifest(tmp_path: Path, edit, message: str):
    write(tmp_path)
    raw = json.loads((tmp_path / NAME).read_text())
    edit(raw)
    (tmp_path / NAME).write_text(json.dumps(raw))
    with pytest.raises(UpstreamError) as caught:
        load_manifest(tmp_path / NAME, "tokenize")
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_truncated_manifest(tmp_path: Path):
    write(tmp_path)
    text = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(text[: len(text) // 2])
    with pytest.raises(UpstreamError, match="a complete manifest; found JSONDecodeError"):
        load_manifest(tmp_path / NAME, "tokenize")


def test_truncated_and_missing_data_files_are_noticed_at_once(tmp_path: Path):
    write(tmp_path)
    data = tmp_path / "sub" / "data.txt"
    data.write_text("dat")
    with pytest.raises(UpstreamError, match=r"4 bytes; found 3 bytes(.|\n)*data.txt"):
        load_manifest(tmp_path / NAME)
    data.unlink()
    with pytest.raises(UpstreamError, match=r"found no such file(.|\n)*data.txt"):
        load_manifest(tmp_path / NAME)


def test_verify_reads_the_bytes(tmp_path: Path):
    manifest = write(tmp_path)
    (tmp_path / "sub" / "data.txt").write_text("dbta")
    load_manifest(tmp_path / NAME)
    with pytest.raises(StoreError, match=r"sha256(.|\n)*data.txt"):
        manifest.verify()


def test_file_not_listed(tmp_path: Path):
    with pytest.raises(StoreError, match="a file other.txt of stage tokenize; found sub/data.txt"):
        write(tmp_path).file("other.txt")


def test_upstreams_must_belong_together(tmp_path: Path):
    tokens = write(tmp_path / "tokenize")
    write(tmp_path / "cache", "cache", inputs={"tokenize": tokens})
    paths = {"tokenize": tmp_path / "tokenize" / NAME, "cache": tmp_path / "cache" / NAME, "toyworld": None}
    assert set(load_upstreams(**paths)) == {"tokenize", "cache"}
    write(tmp_path / "tokenize", text="other")
    with pytest.raises(UpstreamError, match="stage cache made from the given tokenize"):
        load_upstreams(**paths)


def test_partial_work_continues_only_for_the_same_work(tmp_path: Path):
    first = StageOutput("tokenize", Config(), {}, tmp_path)
    first.path("part").write_text("half")
    first.ledger.put("part", rows=5)
    again = StageOutput("tokenize", Config(), {}, tmp_path)
    assert again.ledger.continued and again.ledger.get("part") == {"rows": 5}
    assert (tmp_path / "part").read_text() == "half"
    other = StageOutput("tokenize", Config(2), {}, tmp_path)
    assert not other.ledger.continued and other.ledger.get("part") is None
    assert not (tmp_path / "part").exists()


def test_foreign_leftovers_are_cleared_and_units_kept(tmp_path: Path):
    (tmp_path / "shard" / "a").mkdir(parents=True)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "x").write_text("x")
    output = StageOutput("cache", Config(), {}, tmp_path, keep=("shard",))
    assert (tmp_path / "shard" / "a").is_dir() and not (tmp_path / "junk").exists()
    (tmp_path / "shard" / "a" / "x").write_text("x")
    output.path("own").write_text("1")
    assert set(output.finish({}).files) == {"own"}


def test_finished_work_is_done_anew(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "sub" / "data.txt").write_text("damaged since")
    again = StageOutput("tokenize", Config(), {}, tmp_path)
    assert not again.ledger.continued and not (tmp_path / "sub").exists()


def test_starting_removes_the_done_mark(tmp_path: Path):
    write(tmp_path)
    StageOutput("tokenize", Config(), {}, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_stage_of_another_version(tmp_path: Path):
    written = write(tmp_path)
    (tmp_path / NAME).write_text(dataclasses.replace(written, stage="tokenise").to_json())
    with pytest.raises(UpstreamError, match="a stage of this version; found stage tokenise"):
        load_manifest(tmp_path / NAME)


def test_a_ledger_line_cut_short_counts_as_not_written(tmp_path: Path):
    output = StageOutput("tokenize", Config(), {}, tmp_path)
    output.ledger.put("a", rows=1)
    output.ledger.put("b", rows=2)
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text()[:-8])
    again = StageOutput("tokenize", Config(), {}, tmp_path)
    assert again.ledger.keys() == ("a",)
    again.ledger.put("b", rows=2)
    assert StageOutput("tokenize", Config(), {}, tmp_path).ledger.keys() == ("a", "b")


def test_counts_must_be_finite(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        StageOutput("tokenize", Config(), {}, tmp_path).finish({"loss": float("nan")})
