"""`circuitmill verify`: every kind of damage is named once, at the right path, and with what mends it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from circuitmill.config.compose import load_run
from circuitmill.errors import StoreError
from circuitmill.pipeline import STAGES
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.files import digest_of, sha256_file
from circuitmill.stores.findings import Finding
from circuitmill.stores.manifest import NAME, TIMING, Manifest, StageOutput, load_manifest
from circuitmill.stores.verify import verify

RUN = load_run("tiny")
SHARD = "cache/shard/train-00000"
CHUNK = f"{SHARD}/activations.zarr/c/0"


def write_stage(run: Path, name: str, made: dict[str, Manifest], note: str = "") -> None:
    """Write a stage of the tiny run with made-up data files, its units first."""
    row = stage_row(name)
    cfg, out = RUN.config(name, "" if row.shared else "main"), run / ("" if row.shared else "main") / name
    inputs = {upstream: made[upstream] for upstream in row.upstream}
    units = {}
    for unit in cfg.units() if row.unit else ():
        part = StageOutput(name, cfg, inputs, out / str(row.unit) / unit, unit=unit)
        for place in ("activations.zarr/zarr.json", "activations.zarr/c/0", "moments.safetensors"):
            part.path(place).write_text(f"{name} {unit} {place} {note}")
        units[unit] = part.finish({})
    output = StageOutput(name, cfg, inputs, out, keep=(row.unit,) if row.unit else ())
    output.path("part", "data.bin").write_text(f"{name} {note}")
    if name in ("cache", "features"):
        listed = [{"name": unit, "digest": manifest.digest} for unit, manifest in units.items()]
        output.path(f"{row.unit}s.json").write_text(json.dumps(listed))
    made[name] = output.finish({"n": 1})


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results/tiny, every stage and unit of it."""
    checkout = tmp_path_factory.mktemp("checkout")
    made: dict[str, Manifest] = {}
    for stage in STAGES:
        write_stage(checkout / "results/tiny", stage.name, made)
    for name in ("config", "logs/cache/shard", "benchmarks/main/train"):
        (checkout / "results/tiny" / name).mkdir(parents=True)
        (checkout / "results/tiny" / name / "train.txt").write_text("no stage wrote this")
    return checkout


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy, as results/tiny of the current folder."""
    shutil.copytree(whole, tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c")
    return Path("results/tiny")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict], None], *, own_digest: bool = False) -> None:
    """Change a manifest; `own_digest` makes it match itself again."""
    raw = json.loads(path.read_text())
    change(raw)
    if own_digest:
        raw["digest"] = digest_of({key: raw[key] for key in Manifest._IDENTITY})
    path.write_text(json.dumps(raw))


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def only(run: Path) -> Finding:
    """The one finding there is."""
    findings = verify(run).findings
    assert len(findings) == 1, "\n".join(map(str, findings))
    return findings[0]


def fix(folder: str) -> str:
    manifest = f"results/tiny/{folder}/manifest.json"
    return f"rm {manifest} && snakemake {manifest} --config run=tiny"


def test_a_clean_run_has_no_findings_and_every_byte_is_read(run: Path):
    report = verify(run)
    assert report.findings == ()
    manifests = sorted(run.rglob(NAME))
    assert sorted(one.path for one in report.manifests) == manifests
    loaded = [load_manifest(path) for path in manifests]
    assert sum(one.files for one in report.manifests) == sum(len(manifest.files) for manifest in loaded)
    size = sum(entry["bytes"] for manifest in loaded for entry in manifest.files.values())
    assert sum(one.bytes for one in report.manifests) == size
    lines = report.text().splitlines()
    assert len(lines) == len(manifests) + 1 and all("good" in line for line in lines[:-1])
    assert lines[-1].startswith(f"{len(manifests)} manifests, ")
    assert lines[-1].endswith(f" {size:,} bytes read: all good")
    order = [one.path.parent.relative_to(run).as_posix() for one in report.manifests]
    assert order[:4] == ["toyworld", "tokenize", "calibrate", "cache/shard/heldout-00000"]
    assert order.index("cache/shard/train-00001") < order.index("cache") < order.index("main/train")


@pytest.mark.parametrize(
    ("damage", "expected", "found"),
    [
        (flip, "sha256 ", "sha256 "),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), " bytes", " bytes"),
        (lambda path: path.write_bytes(b""), " bytes", "0 bytes"),
        (Path.unlink, " bytes", "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), " bytes", "no such file"),
    ],
    ids=["flipped", "truncated", "emptied", "deleted", "a folder"],
)
@pytest.mark.parametrize(
    ("path", "folder"),
    [
        (CHUNK, SHARD),
        ("cache/part/data.bin", "cache"),
        ("cache/shards.json", "cache"),
        ("main/features/blocks.json", "main/features"),
        ("main/features/block/0001/moments.safetensors", "main/features/block/0001"),
        ("main/train/part/data.bin", "main/train"),
        ("main/report/part/data.bin", "main/report"),
    ],
)
def test_damaged_file(run: Path, damage, expected: str, found: str, path: str, folder: str):
    damage(run / path)
    finding = only(run)
    assert finding.path == run / path and not finding.warning
    assert expected in finding.expected and found in finding.found
    assert finding.fix == fix(folder)
    assert only(run / folder) == only(run / folder / NAME) == finding
    text = verify(run).text()
    assert text.count(f"problem: {run / path}\n") == 1 and text.endswith(" bytes read: 1 problems")
    assert f"{run / folder / NAME}: " not in text and fix(folder) in text


def raise_revision(raw: dict) -> None:
    raw["revision"] += 1


@pytest.mark.parametrize(
    ("change", "own_digest", "expected", "found"),
    [
        (lambda raw: raw["counts"].update(n=4), False, "digest", "an edited one"),
        (lambda raw: raw["files"].clear(), False, "digest", "an edited one"),
        (lambda raw: raw.pop("digest"), False, "digest", "an edited one: None"),
        (lambda raw: raw.update(format_version=99), True, "format version 1", "version 99"),
        (lambda raw: raw.pop("inputs"), False, "a complete manifest", "KeyError"),
        (lambda raw: raw.update(files={"x": {}}), True, "a complete manifest", "KeyError"),
        (lambda raw: raw["counts"].update(n=float("nan")), False, "a complete manifest", "NaN"),
        (lambda raw: raw.update(stage="tokenise"), True, "a stage of this version", "tokenise"),
        (lambda raw: raw.update(stage="tokenize", unit=None), True, "manifest of stage", "tokenize"),
    ],
)
@pytest.mark.parametrize("folder", [SHARD, "main/report", "main/attribute/prompt/capital"])
def test_changed_manifest(run: Path, change, own_digest: bool, expected: str, found: str, folder: str):
    edit(run / folder / NAME, change, own_digest=own_digest)
    finding = only(run)
    assert finding.path == run / folder / NAME
    assert expected in finding.expected and found in finding.found and finding.fix == fix(folder)


def test_manifest_cut_short(run: Path):
    path = run / SHARD / NAME
    path.write_text(path.read_text()[:100])
    assert only(run).path == path and "JSONDecodeError" in only(run).found


def test_results_of_another_revision(run: Path):
    edit(run / "main/report" / NAME, raise_revision, own_digest=True)
    finding = only(run)
    assert finding.path == run / "main/report" / NAME
    own = stage_row("report").revision
    assert f"revision {own} of stage report" in finding.expected and f"revision {own + 1}" in finding.found
    flip(run / "main/report/part/data.bin")
    assert [one.path.name for one in verify(run).problems] == [NAME, "data.bin"]


def test_a_file_that_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("circuitmill.stores.verify.sha256_file", refuse)
    report = verify(run / "toyworld")
    assert [one.found for one in report.problems] == ["Permission denied"]


def test_swapped_units(run: Path):
    swap(run / SHARD, run / "cache/shard/train-00001")
    findings = verify(run).findings
    assert [finding.path for finding in findings] == [run / SHARD / NAME, run / "cache/shard/train-00001" / NAME]
    assert findings[0].expected.endswith("shard train-00000") and findings[0].found.endswith("shard train-00001")
    assert findings[1].fix == fix("cache/shard/train-00001")


def test_swapped_stages(run: Path):
    swap(run / "main/train", run / "main/evaluate")
    findings = verify(run).findings
    assert [finding.path for finding in findings] == [run / "main/train" / NAME, run / "main/evaluate" / NAME]


def test_a_unit_without_manifest(run: Path):
    (run / SHARD / NAME).unlink()
    finding = only(run)
    assert finding.path == run / SHARD / NAME and finding.found == "no such file"
    assert finding.fix == f"snakemake results/tiny/{SHARD}/manifest.json --config run=tiny"
    shutil.rmtree(run / SHARD)
    assert only(run) == finding


@pytest.mark.parametrize(
    ("folder", "gather"), [(SHARD, "cache"), ("main/features/block/0001", "main/features")], ids=["cache", "features"]
)
def test_a_unit_made_anew_with_other_bytes_makes_the_gather_stale(run: Path, folder: str, gather: str):
    unit = Path(folder).name
    old = load_manifest(run / folder / NAME)
    data = run / folder / "activations.zarr/c/0"
    data.write_text("another")
    entry = {"bytes": data.stat().st_size, "sha256": sha256_file(data)}
    edit(run / folder / NAME, lambda raw: raw["files"].update({"activations.zarr/c/0": entry}), own_digest=True)
    assert load_manifest(run / folder / NAME).digest != old.digest
    finding = only(run)
    assert finding.path == run / gather / NAME and finding.fix == fix(gather)
    assert unit in finding.expected and "stale" in finding.found
    assert only(run / gather) == finding


def test_a_unit_of_another_configuration(run: Path):
    folder = run / "main/interpret/block/0000"
    edit(folder / NAME, lambda raw: raw["config"].update(blocks=7), own_digest=True)
    finding = only(run)
    assert finding.path == folder / NAME and "configuration" in finding.expected


def test_stale_downstream_is_named_as_such(run: Path):
    made = {"toyworld": load_manifest(run / "toyworld" / NAME)}
    before = load_manifest(run / "tokenize" / NAME).digest
    write_stage(run, "tokenize", made, note="made again, otherwise")
    findings = verify(run).findings
    readers = [stage for stage in STAGES if "tokenize" in stage.upstream]
    folders = []
    for stage in readers:
        home = run / ("" if stage.shared else "main") / stage.name
        folders += [path.parent for path in home.glob(f"{stage.unit}/*/{NAME}")] if stage.unit else []
        folders.append(home)
    assert sorted(finding.path for finding in findings) == sorted(folder / NAME for folder in folders)
    for finding in findings:
        assert f"tokenize as it is now ({made['tokenize'].digest[:12]})" in finding.expected
        assert f"stale one, made from tokenize as it was ({before[:12]})" in finding.found
    assert only(run / SHARD).path == run / SHARD / NAME, "the upstream is found outside the folder that is checked"
    shutil.rmtree(run / "tokenize")
    assert verify(run).findings == (), "nothing to compare with"


def test_variants_may_use_the_shared_stage_of_another(run: Path):
    for name in ("tokenize", "calibrate", "cache"):
        shutil.copytree(run / name, run / "other" / name)
    (run / "cache").rename(run / "main/cache")
    for folder in (SHARD, "cache"):
        change = lambda raw: raw["sources"].update(x="y")  # noqa: E731
        edit(run / "other" / folder / NAME, change, own_digest=True)
    listed = run / "other/cache/shards.json"
    digest = load_manifest(run / "other" / SHARD / NAME).digest
    listed.write_text(listed.read_text().replace(load_manifest(run / "main" / SHARD / NAME).digest, digest))
    entry = {"bytes": listed.stat().st_size, "sha256": sha256_file(listed)}
    edit(run / "other/cache" / NAME, lambda raw: raw["files"].update({"shards.json": entry}), own_digest=True)
    shutil.copytree(run / "main/train", run / "third/train")
    assert verify(run).findings == (), "third uses the cache of main"
    flip(run / "main" / CHUNK)
    assert only(run).fix == fix(f"main/{SHARD}")
    shutil.rmtree(run / "main/cache")
    stale = [finding.path for finding in verify(run).problems if "third" in str(finding.path)]
    assert stale == [run / "third/train" / NAME], "no variant has the cache that it was made from"


def test_an_edited_upstream_does_not_make_others_stale(run: Path):
    edit(run / "tokenize" / NAME, lambda raw: raw["counts"].update(n=4))
    assert only(run).path == run / "tokenize" / NAME


def test_leftovers_are_warnings(run: Path):
    (run / SHARD / "activations.zarr/c/1").write_text("nobody's")
    (run / "main/train/wandb/run-1").mkdir(parents=True)
    for name in "ab":
        (run / "main/train/wandb/run-1" / name).write_text("123")
    (run / "main/train/empty").mkdir()
    (run / "tokenize/ledger.jsonl").write_text("")
    report = verify(run)
    named = {finding.path: finding for finding in report.findings}
    assert sorted(named) == sorted(
        [run / SHARD / "activations.zarr/c/1", run / "main/train/wandb", run / "tokenize/ledger.jsonl"]
    )
    assert report.problems == () and all(finding.warning for finding in report.findings)
    assert "2 files, 6 bytes" in named[run / "main/train/wandb"].found
    assert report.text().endswith("all good, 3 warnings") and "main/train/manifest.json: 1 files" in report.text()


def test_a_stage_that_is_not_finished_is_a_warning(run: Path):
    (run / "main/report" / NAME).unlink()
    finding = only(run)
    assert finding.warning and finding.path == run / "main/report" and "interrupted" in finding.found


def test_a_unit_of_an_earlier_configuration_is_a_warning_whatever_is_in_it(run: Path):
    shutil.copytree(run / SHARD, run / "cache/shard/train-00009")
    finding = only(run)
    assert finding.warning and finding.path == run / "cache/shard/train-00009"


def test_a_ledger_left_by_a_crash_goes_with_the_manifest(run: Path):
    (run / SHARD / "ledger.jsonl").write_text("")
    flip(run / CHUNK)
    problem = verify(run).problems[0]
    assert problem.fix.startswith(f"rm results/tiny/{SHARD}/manifest.json results/tiny/{SHARD}/ledger.jsonl && ")


def test_times_are_not_among_the_files_but_must_be_readable(run: Path):
    (run / "tokenize" / TIMING).write_text('{"wall_seconds": 1.0, "peak_memory_bytes": 7}\n')
    assert verify(run).findings == ()
    (run / "tokenize" / TIMING).unlink()
    assert verify(run).findings == ()
    (run / "tokenize" / TIMING).write_text("{")
    assert only(run).path == run / "tokenize" / TIMING and only(run).fix.startswith("delete ")


def test_everything_wrong_is_named_at_once_in_the_order_of_the_pipeline(run: Path):
    flip(run / "main/report/part/data.bin")
    flip(run / CHUNK)
    (run / SHARD / "moments.safetensors").unlink()
    edit(run / "main/train" / NAME, lambda raw: raw["counts"].update(n=4))
    assert [finding.path for finding in verify(run).problems] == [
        run / CHUNK,
        run / SHARD / "moments.safetensors",
        run / "main/train" / NAME,
        run / "main/report/part/data.bin",
    ]


def test_from_another_folder_the_fix_goes_to_the_checkout(run: Path, monkeypatch: pytest.MonkeyPatch):
    flip(run / CHUNK)
    checkout = Path.cwd()
    monkeypatch.chdir(run / SHARD)
    finding = only(Path())
    assert finding.path == Path("activations.zarr/c/0")
    assert finding.fix == f"cd {checkout} && {fix(SHARD)}"


def test_by_hand_outside_a_run(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = 1

    output = StageOutput("tokenize", Config(), {}, tmp_path / "elsewhere")
    output.path("data").write_text("data")
    output.finish({})
    assert verify(tmp_path).findings == ()
    flip(tmp_path / "elsewhere/data")
    manifest = tmp_path / "elsewhere/manifest.json"
    assert only(tmp_path).fix == f"rm {manifest}, then run its stage again with --out {tmp_path / 'elsewhere'}"


def test_linked_folders_are_followed(run: Path, tmp_path: Path):
    (run / "cache").rename(tmp_path / "scratch")
    (run / "cache").symlink_to(tmp_path / "scratch")
    (run / "loop").symlink_to(run.resolve())
    assert verify(run).findings == ()
    flip(run / CHUNK)
    assert only(run).path == run / CHUNK


@pytest.mark.parametrize("path", ["missing", "results/tiny/logs", "results/tiny/tokenize/part/data.bin"])
def test_nothing_to_check(run: Path, path: str):
    with pytest.raises(StoreError, match=r"fix: +name"):
        verify(Path(path))


def test_a_training_that_started_from_another_is_good(run: Path):
    """Its base may lie in another run, so nothing is said about it."""
    edit(run / "main/train/manifest.json", lambda raw: raw["inputs"].update(base="0" * 64), own_digest=True)
    train = load_manifest(run / "main/train/manifest.json", "train")
    for stage in ("evaluate", "features", "attribute", "report"):
        assert "train" in load_manifest(run / f"main/{stage}/manifest.json", stage).inputs
    findings = verify(run / "main/train").findings
    assert not findings, "\n".join(map(str, findings))
    assert train.inputs["base"] == "0" * 64
