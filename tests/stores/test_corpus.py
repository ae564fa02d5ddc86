import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.corpus import Document, read_documents, require_files

TEXTS = ["first", "zweiter Satz: Grüße", "", "中文 third"]


def _read(path: Path, unit: str = "line", field: str = "text") -> list[Document]:
    return list(read_documents(path, source="s", unit=unit, field=field))


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def _write(path: Path) -> Path:
    if path.name.endswith(".txt"):
        path.write_bytes("\n".join(TEXTS).encode() + b"\n")
    elif path.name.endswith(".jsonl"):
        path.write_bytes(_jsonl(TEXTS))
    elif path.name.endswith(".zst"):
        # two frames, as parallel compressors write them
        path.write_bytes(b"".join(zstandard.compress(_jsonl(part)) for part in (TEXTS[:1], TEXTS[1:])))
    else:
        pq.write_table(pa.table({"text": [*TEXTS[:2], None, TEXTS[3]], "n": [1, 2, 3, 4]}), path)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    found = _read(_write(tmp_path / name))
    assert [(document.row, document.text) for document in found] == list(enumerate(TEXTS))


def test_whole_file_as_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [document.text for document in _read(path, unit="file")] == ["one\ntwo\n"]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert [document.text for document in _read(path)] == ["one", "two"]


@pytest.mark.parametrize("unit", ["line", "file"])
def test_invalid_utf8_names_line_and_byte(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xff here\n")
    with pytest.raises(StoreError, match=r"UTF-8 text; found byte 0xff(.|\n)*a\.txt, line 2, byte 9"):
        _read(path, unit=unit)


def test_malformed_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(StoreError, match=r"one JSON object per line(.|\n)*a\.jsonl, line 2"):
        _read(path)


def test_missing_field_lists_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "id": 3}\n')
    with pytest.raises(ConfigError, match=r"a field 'text'.*found fields content, id(.|\n)*line 1"):
        _read(path)
    path.write_text('{"text": 5}\n')
    with pytest.raises(StoreError, match=r"text in field 'text'; found int"):
        _read(path)


def test_parquet_column(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a column 'body'.*found columns text, n"):
        _read(path, field="body")
    with pytest.raises(ConfigError, match=r"text in column 'n'; found int64"):
        _read(path, field="n")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = _write(path).read_bytes()
    path.write_bytes(content[: len(content) - 7])
    with pytest.raises(StoreError, match=f"a whole (.|\n)*{name}"):
        _read(path)


def test_files_must_exist_and_hold_something(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file(.|\n)*tokenize\.files: .*gone\.txt"):
        require_files((str(tmp_path / "gone.txt"),))
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(StoreError, match=r"a file with text; found 0 bytes(.|\n)*empty\.txt"):
        require_files((str(empty),))
