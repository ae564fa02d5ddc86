"""Reading documents from local text files: .txt, .jsonl, .jsonl.zst and .parquet.

Text is UTF-8, and a file that is not says at which byte. Nothing is skipped but documents without any text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from circuitmill.errors import ConfigError, StoreError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from."""

    source: str
    row: int
    """Line or row of the source, from 0."""
    text: str


def require_files(files: tuple[str, ...]) -> list[Path]:
    """Paths of the source files.

    Raises:
        ConfigError: one of them does not exist.
        StoreError: one of them is empty.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                "a text file", found="no such file", where=f"tokenize.files: {path}", fix="correct the path"
            )
        if path.stat().st_size == 0:
            raise StoreError("a file with text", found="0 bytes", where=path, fix="fill it or leave it out")
    return paths


def read_documents(path: Path, *, source: str, unit: str, field: str) -> Iterator[Document]:
    """The documents of one file, in order.

    Args:
        source: Name that the documents carry.
        unit: Of a .txt file: "line" or "file".
        field: JSON field or Parquet column with the text.

    Raises:
        StoreError: not UTF-8, not JSON, or damaged; says where.
        ConfigError: there is no such field.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet(path, source, field)
    elif path.name.endswith(".txt") and unit == "file":
        yield Document(source, 0, _text(path.read_bytes().removeprefix(_BOM), path, 0, 0))
    else:
        for row, (start, line) in enumerate(_lines(path)):
            text = _text(line, path, row, start)
            yield Document(source, row, text if path.name.endswith(".txt") else _json(text, path, row, field))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines without their end, with the byte at which each starts."""
    with path.open("rb") as file:
        if not path.name.endswith(".zst"):
            yield from _split(file)
            return
        try:
            yield from _split(_decompressed_lines(file))
        except zstandard.ZstdError as error:
            raise StoreError(
                "a whole zstd file", found=str(error), where=path, fix="copy or download the file again"
            ) from error


def _decompressed_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd file of any number of frames; its stream readers take a truncated one for its end."""
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    while chunk := file.read(2**20):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            for line in lines:
                yield line + b"\n"
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise zstandard.ZstdError("the file ends inside a frame")
    if rest:
        yield rest


def _split(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    start = 0
    for line in lines:
        content = line.removeprefix(_BOM) if start == 0 else line
        yield start, content.rstrip(b"\r\n")
        start += len(line)


def _text(content: bytes, path: Path, row: int, start: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = row + 1 + content.count(b"\n", 0, error.start)
        raise StoreError(
            "UTF-8 text",
            found=f"byte 0x{content[error.start]:02x} ({error.reason})",
            where=f"{path}, line {line}, byte {start + error.start}",
            fix="convert the file to UTF-8, for example with iconv",
        ) from error


def _json(line: str, path: Path, row: int, field: str) -> str:
    if not line.strip():
        return ""
    where = f"{path}, line {row + 1}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise StoreError(
            "one JSON object per line", found=f"{error.msg} at column {error.colno}", where=where, fix="repair the line"
        ) from error
    if not isinstance(value, dict) or field not in value:
        found = "fields " + ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ConfigError(
            f"a field {field!r} with the text",
            found=found,
            where=f"{where} (tokenize.text_field)",
            fix="name its field",
        )
    if not isinstance(value[field], str):
        raise StoreError(
            f"text in field {field!r}",
            found=type(value[field]).__name__,
            where=where,
            fix="choose another tokenize.text_field or repair the line",
        )
    return value[field]


def _parquet(path: Path, source: str, column: str) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ConfigError(
                f"a column {column!r} with the text",
                found="columns " + ", ".join(file.schema_arrow.names),
                where=f"{path} (tokenize.text_field)",
                fix="name its column",
            )
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(
                f"text in column {column!r}",
                found=str(kind),
                where=f"{path} (tokenize.text_field)",
                fix="name a column of strings",
            )
        row = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield Document(source, row, text or "")
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreError(
            "a whole Parquet file", found=error, where=path, fix="copy or download the file again"
        ) from error
