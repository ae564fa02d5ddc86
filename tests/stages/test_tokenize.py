import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from circuitmill.config.model import ModelConfig
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.lm.load import load_tokenizer
from circuitmill.stages import tokenize
from circuitmill.stores import token_writer
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.tokens import TokenStore

BOS = 1


def _texts(count: int = 300) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefgh "), size=int(rng.integers(3, 80)))) + str(i) for i in range(count)]


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> TokenizeConfig:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(_texts()) + "\n")
    return TokenizeConfig(
        model=ModelConfig(source="folder", name=str(tiny_model_dir), revision="", dtype="float32"),
        source="files",
        files=(str(corpus),),
        text_field="text",
        text_unit="line",
        dataset="",
        dataset_config="",
        dataset_split="",
        dataset_revision="",
        network=False,
        context=16,
        heldout_fraction=0.2,
        max_train_tokens=None,
        max_heldout_tokens=None,
        sequences_per_file=50,
        sequences_per_group=8,
        documents_per_file=64,
        keep_text=True,
    )


def _with(config: TokenizeConfig, content: bytes, name: str = "other.txt", **changes: object) -> TokenizeConfig:
    path = Path(config.files[0]).with_name(name)
    path.write_bytes(content)
    return dataclasses.replace(config, files=(str(path),), **changes)


def _run(config: TokenizeConfig, out: Path) -> tuple[Manifest, TokenStore]:
    tokenize.run(config, out=out)
    manifest = load_manifest(out / "manifest.json", "tokenize")
    manifest.verify()
    return manifest, TokenStore.open(manifest)


def _all(store: TokenStore, split: str) -> np.ndarray:
    return store.read(split, 0, store.n_sequences(split))


def test_sequences_begin_with_bos_and_hold_the_documents(config: TokenizeConfig, tmp_path: Path) -> None:
    manifest, store = _run(config, tmp_path / "out")
    tokenizer = load_tokenizer(config.model, toyworld=None)
    texts = set(_texts())
    for split in ("train", "heldout"):
        tokens = _all(store, split)
        assert tokens.dtype == np.int32
        assert tokens.shape == (manifest.counts["sequences"][split], 16)
        assert (tokens[:, 0] == BOS).all()
        assert (tokens != BOS).sum() == manifest.counts["tokens"][split]
        first = tokens[0, 1:].tolist()
        if BOS in first:
            assert tokenizer.decode(first[: first.index(BOS)]) in texts
    counts = manifest.counts
    total = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _texts())
    assert total == sum(counts["tokens"].values()) + sum(counts["dropped_tokens"].values())
    assert sum(counts["documents"].values()) == 300
    assert 30 < counts["documents"]["heldout"] < 90


def test_every_token_traces_back_to_its_text(config: TokenizeConfig, tmp_path: Path) -> None:
    _, store = _run(config, tmp_path / "out")
    tokenizer = load_tokenizer(config.model, toyworld=None)
    texts = _texts()
    for split in ("train", "heldout"):
        tokens = _all(store, split)
        for sequence in range(0, len(tokens), 37):
            for pos in range(store.context):
                location = store.locate(split, sequence, pos)
                if tokens[sequence, pos] == BOS:
                    assert location is None
                    continue
                assert location.split == split
                assert location.text == texts[location.row]
                assert location.source == config.files[0]
                ids = tokenizer(location.text, add_special_tokens=False)["input_ids"]
                assert ids[location.offset] == tokens[sequence, pos]
                assert len(ids) == location.n_tokens


def test_no_document_and_no_copy_spans_the_split(config: TokenizeConfig, tmp_path: Path) -> None:
    twice = _with(config, "\n".join(_texts() + _texts()).encode())
    manifest, _ = _run(twice, tmp_path / "out")
    sides: dict[bytes, set[str]] = {}
    for relative in manifest.files:
        if relative.startswith("documents"):
            for row in pq.read_table(manifest.file(relative)).to_pylist():
                assert row["sha"] == hashlib.sha256(row["text"].encode()).digest()
                sides.setdefault(row["sha"], set()).add(row["split"])
    assert len(sides) == 300
    assert all(len(side) == 1 for side in sides.values())


def test_read_any_range(config: TokenizeConfig, tmp_path: Path) -> None:
    _, store = _run(config, tmp_path / "out")
    tokens = _all(store, "train")
    for start, stop in ((0, 1), (49, 51), (7, 133), (len(tokens) - 1, len(tokens))):
        assert np.array_equal(store.read("train", start, stop), tokens[start:stop])
    with pytest.raises(StoreError, match=f"sequences within 0 to {len(tokens)}"):
        store.read("train", 0, len(tokens) + 1)


def test_files_are_plain_parquet_with_the_documented_columns(config: TokenizeConfig, tmp_path: Path) -> None:
    manifest, _ = _run(config, tmp_path / "out")
    file = pq.ParquetFile(manifest.file("train/sequences-00000.parquet"), page_checksum_verification=True)
    assert file.schema_arrow.names == ["sequence", "tokens", "segments"]
    assert (file.metadata.num_rows, file.metadata.row_group(0).num_rows) == (50, 8)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert len(file.read()["tokens"][3].as_py()) == 16


def test_text_that_spells_bos_is_only_text(config: TokenizeConfig, tmp_path: Path) -> None:
    lines = [f"before <|endoftext|> after, number {i}" for i in range(40)]
    _, store = _run(_with(config, "\n".join(lines).encode()), tmp_path / "out")
    tokenizer = load_tokenizer(config.model, toyworld=None)
    decoded = "".join(tokenizer.decode(row[row != BOS].tolist()) for row in _all(store, "train"))
    assert decoded.count("<|endoftext|>") > 20


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.mark.parametrize("limit", [None, 1500])
@pytest.mark.parametrize("survives", [1, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bytes(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, survives: int
) -> None:
    monkeypatch.setattr(tokenize, "_BATCH", 16)
    config = dataclasses.replace(config, sequences_per_file=20, max_train_tokens=limit)
    straight = tokenize.run(config, out=tmp_path / "straight")
    write, done = token_writer.write_parquet, []

    def killed(*arguments: object) -> None:
        if len(done) == survives:
            raise KeyboardInterrupt
        done.append(arguments[0])
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer, "write_parquet", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize.run(config, out=tmp_path / "broken")
    again = []
    monkeypatch.setattr(token_writer, "write_parquet", lambda *a: (again.append(a[0]), write(*a)))
    resumed = tokenize.run(config, out=tmp_path / "broken")
    assert not set(done) & set(again)
    assert _files(tmp_path / "broken") == _files(tmp_path / "straight")
    assert resumed.counts == straight.counts
    assert resumed.digest == straight.digest


def test_other_text_starts_anew(config: TokenizeConfig, tmp_path: Path) -> None:
    first = tokenize.run(config, out=tmp_path / "out")
    Path(config.files[0]).write_text("\n".join(reversed(_texts())))
    second = tokenize.run(config, out=tmp_path / "out")
    assert first.sources != second.sources
    assert second.digest == tokenize.run(config, out=tmp_path / "fresh").digest


def test_limits(config: TokenizeConfig, tmp_path: Path) -> None:
    limited = dataclasses.replace(config, max_train_tokens=161, max_heldout_tokens=32)
    manifest, store = _run(limited, tmp_path / "out")
    assert manifest.counts["sequences"] == {"train": 11, "heldout": 2}
    _, whole = _run(config, tmp_path / "whole")
    assert np.array_equal(_all(store, "train"), whole.read("train", 0, 11))


def test_text_can_be_left_out(config: TokenizeConfig, tmp_path: Path) -> None:
    _, store = _run(dataclasses.replace(config, keep_text=False), tmp_path / "out")
    assert store.locate("train", 0, 1).text is None


def test_hub_data_set_layout(config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` streams from a local folder exactly as from the hub
    folder = tmp_path / "data-set"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in _texts())
    (folder / "train.jsonl").write_text(rows)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = dataclasses.replace(
        config,
        source="huggingface",
        files=(),
        dataset=str(folder),
        dataset_split="train",
        network=True,
        max_train_tokens=1600,
        max_heldout_tokens=160,
    )
    _, store = _run(hub, tmp_path / "out")
    _, local = _run(config, tmp_path / "local")
    assert np.array_equal(_all(store, "train"), local.read("train", 0, 100))
    missing = dataclasses.replace(hub, text_field="content")
    with pytest.raises(ConfigError, match=r"a feature 'content'.*found text"):
        tokenize.run(missing, out=tmp_path / "missing")
    absent = dataclasses.replace(hub, dataset_split="nothing")
    with pytest.raises(ConfigError, match=r"can be streamed(.|\n)*tokenize\.dataset"):
        tokenize.run(absent, out=tmp_path / "absent")


def test_the_source_must_be_complete(config: TokenizeConfig, tmp_path: Path) -> None:
    hub = dataclasses.replace(config, source="huggingface", dataset="a/b")
    for cfg, message in (
        (hub, r"permission to contact(.|\n)*tokenize\.network(.|\n)*network=true"),
        (dataclasses.replace(hub, network=True), r"tokenize\.max_train_tokens"),
        (dataclasses.replace(config, files=()), r"at least one file(.|\n)*tokenize\.files"),
        (dataclasses.replace(config, files=("a.pdf",)), r"\.jsonl\.zst, \.parquet(.|\n)*a\.pdf"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize.run(cfg, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_embedded_corpus_keeps_its_split_but_not_copies(
    config: TokenizeConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "toyworld"
    output = StageOutput("toyworld", config, {}, folder)
    for path in tiny_model_dir.iterdir():
        output.path("model", path.name).write_bytes(path.read_bytes())
    texts = _texts(120)
    output.path("corpus", "train.txt").write_text("\n".join(texts[:100]) + "\n\n")
    output.path("corpus", "heldout.txt").write_text("\n".join(texts[90:]))
    world = output.finish({}).folder / "manifest.json"
    embedded = dataclasses.replace(
        config,
        source="toyworld",
        files=(),
        heldout_fraction=0.0,
        model=ModelConfig(source="toyworld", name="toyworld", revision="", dtype="float32"),
    )
    manifest = tokenize.run(embedded, toyworld=world, out=tmp_path / "out")
    assert manifest.counts["documents"] == {"train": 100, "heldout": 20}
    assert manifest.counts["duplicate_documents"] == 10
    assert manifest.counts["empty_documents"] == 1
    assert set(manifest.inputs) == {"toyworld"}
    with pytest.raises(UpstreamError, match="--toyworld"):
        tokenize.run(embedded, out=tmp_path / "without")
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", StoreError, r"a file with text; found 0 bytes(.|\n)*other\.txt"),
        (b"\n  \n\n", ConfigError, r"at least one sequence of 16 tokens in split train; found 0 documents"),
        (b"short\n", ConfigError, r"at least one sequence of 16 tokens in split"),
        (b"fine\nnot \xc3( fine\n", StoreError, r"UTF-8 text; found byte 0xc3(.|\n)*other\.txt, line 2, byte 9"),
    ],
)
def test_bad_corpora_are_refused(
    config: TokenizeConfig, tmp_path: Path, content: bytes, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        tokenize.run(_with(config, content), out=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_bad_corpus_leaves_an_earlier_result_of_another_run_alone(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenize.run(config, out=tmp_path / "out")
    with pytest.raises(StoreError):
        tokenize.run(_with(config, b""), out=tmp_path / "out")
    load_manifest(tmp_path / "out" / "manifest.json", "tokenize").verify()


def test_running_again_repairs_damage(config: TokenizeConfig, tmp_path: Path) -> None:
    manifest, _ = _run(config, tmp_path / "out")
    path = manifest.file("train/sequences-00000.parquet")
    whole = path.read_bytes()
    path.write_bytes(b"x" * len(whole))
    tokenize.run(config, out=tmp_path / "out")
    assert path.read_bytes() == whole


def test_context_beyond_the_models(config: TokenizeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most 32 tokens(.|\n)*found 33(.|\n)*tokenize\.context"):
        tokenize.run(dataclasses.replace(config, context=33), out=tmp_path / "out")


@pytest.mark.parametrize("at", [100, -50])
def test_a_flipped_byte_is_found(config: TokenizeConfig, tmp_path: Path, at: int) -> None:
    manifest, store = _run(config, tmp_path / "out")
    path = manifest.file("train/sequences-00001.parquet")
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    assert store.read("train", 0, 50).shape == (50, 16)
    with pytest.raises(StoreError, match=r"whole Parquet file(.|\n)*train/sequences-00001\.parquet"):
        store.read("train", 50, 51)
