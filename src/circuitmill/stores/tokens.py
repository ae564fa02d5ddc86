"""The token store: packed sequences and the documents they came from, as Parquet.

    train/sequences-00000.parquet, heldout/sequences-00000.parquet, ...
        sequence  int64                       number within the split, from 0
        tokens    fixed_size_list<int32>      `context` token ids; BOS first and between documents
        segments  list<struct>                pieces of documents, in order:
            start    int16                    position of the piece's first token
            document int64                    row of the documents table
            offset   int32                    number of that token in its document
    documents-00000.parquet, ...
        document int64, source string, row int64 (in the source, from 0), sha binary (SHA-256 of the text),
        split string, n_tokens int32, text string (null if not kept)

A piece ends where the next one's BOS stands, or with the sequence. Pages are compressed by zstd and carry checksums.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32

from circuitmill.errors import StoreError
from circuitmill.stores.files import atomic_write, sha256_file
from circuitmill.stores.manifest import Manifest

SPLITS = ("train", "heldout")
SEGMENTS = pa.list_(pa.struct([("start", pa.int16()), ("document", pa.int64()), ("offset", pa.int32())]))
DOCUMENTS = pa.schema(
    [
        ("document", pa.int64()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("sha", pa.binary(32)),
        ("split", pa.string()),
        ("n_tokens", pa.int32()),
        ("text", pa.string()),
    ]
)


def sequences_schema(context: int) -> pa.Schema:
    """Schema of a file of sequences."""
    return pa.schema([("sequence", pa.int64()), ("tokens", pa.list_(pa.int32(), context)), ("segments", SEGMENTS)])


def sequences_name(split: str, index: int) -> str:
    """Path of a file of sequences."""
    return f"{split}/sequences-{index:05d}.parquet"


def documents_name(index: int) -> str:
    """Path of a file of the documents table."""
    return f"documents-{index:05d}.parquet"


def write_parquet(path: Path, table: pa.Table, row_group: int) -> None:
    """Write a table whole or not at all, with zstd and page checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group, compression="zstd", write_page_checksum=True)
    atomic_write(path, sink.getvalue())


@dataclass(frozen=True)
class Location:
    """Where a token of a sequence comes from."""

    document: int
    offset: int
    """Number of the token in its document, from 0."""
    source: str
    """File or data set."""
    row: int
    """Line or row of the source, from 0."""
    split: str
    n_tokens: int
    """Tokens in the document."""
    text: str | None
    """The document's text, if the store keeps it."""


class TokenStore:
    """Read access to the sequences of both splits and to the documents behind them."""

    def __init__(self, manifest: Manifest) -> None:
        counts = manifest.counts
        self.manifest = manifest
        self.context, self.bos_id = int(counts["context"]), int(counts["bos_id"])
        self._sequences: dict[str, int] = counts["sequences"]
        self._per_file = int(counts["sequences_per_file"])
        self._documents_per_file = int(counts["documents_per_file"])
        self._files: dict[str, pq.ParquetFile] = {}

    @classmethod
    def open(cls, manifest: Manifest) -> "TokenStore":
        """Open what a manifest of stage tokenize describes."""
        return cls(manifest)

    def n_sequences(self, split: str) -> int:
        """Sequences in a split ("train" or "heldout")."""
        return int(self._sequences[split])

    def _damaged(self, found: object, path: Path) -> StoreError:
        return StoreError(
            "a whole Parquet file whose checksums match",
            found=found,
            where=path,
            fix=f"delete {self.manifest.folder} and rerun stage tokenize",
        )

    def _open(self, relative: str) -> pq.ParquetFile:
        """Open a file once, after comparing its bytes with the manifest."""
        if relative not in self._files:
            path = self.manifest.file(relative)
            if not path.is_file():
                raise self._damaged("no such file", path)
            if sha256_file(path) != self.manifest.files[relative]["sha256"]:
                raise self._damaged("other bytes than were written", path)
            self._files[relative] = pq.ParquetFile(path, page_checksum_verification=True)
        return self._files[relative]

    def _table(self, relative: str, columns: Sequence[str], start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of a file, reading only the row groups they lie in."""
        file = self._open(relative)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        try:
            table = file.read_row_groups(list(range(first, last + 1)), columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error, self.manifest.folder / relative) from error
        return table.slice(start - (int(ends[first - 1]) if first else 0), stop - start)

    def read(self, split: str, start: int, stop: int) -> Int32[np.ndarray, "sequence pos"]:
        """Token ids of sequences [start, stop) of a split.

        Raises:
            StoreError: outside the split, or damaged.
        """
        if not 0 <= start < stop <= self.n_sequences(split):
            raise StoreError(
                f"sequences within 0 to {self.n_sequences(split)}",
                found=f"{start} to {stop}",
                where=f"{self.manifest.folder}, split {split}",
                fix="read inside the split",
            )
        parts = []
        for index in range(start // self._per_file, (stop - 1) // self._per_file + 1):
            low, high = max(start - index * self._per_file, 0), min(stop - index * self._per_file, self._per_file)
            tokens = self._table(sequences_name(split, index), ["tokens"], low, high)["tokens"]
            flat = tokens.combine_chunks().flatten()
            parts.append(flat.to_numpy(zero_copy_only=False).reshape(-1, self.context))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def locate(self, split: str, sequence: int, pos: int) -> Location | None:
        """The document that a token comes from, and its place in it; None for BOS.

        Raises:
            StoreError: outside the split, or damaged.
        """
        if not (0 <= sequence < self.n_sequences(split) and 0 <= pos < self.context):
            raise StoreError(
                f"sequence below {self.n_sequences(split)} and position below {self.context}",
                found=f"sequence {sequence}, position {pos}",
                where=f"{self.manifest.folder}, split {split}",
                fix="locate a token inside the split",
            )
        index, row = divmod(sequence, self._per_file)
        table = self._table(sequences_name(split, index), ["tokens", "segments"], row, row + 1)
        if table["tokens"][0].values[pos].as_py() == self.bos_id:
            return None
        segment = [piece for piece in table["segments"][0].as_py() if piece["start"] <= pos][-1]
        number, offset = segment["document"], segment["offset"] + pos - segment["start"]
        document = self._document(number)
        return Location(
            document=number,
            offset=offset,
            source=document["source"],
            row=document["row"],
            split=document["split"],
            n_tokens=document["n_tokens"],
            text=document["text"],
        )

    def _document(self, number: int) -> dict:
        relative = documents_name(number // self._documents_per_file)
        file = self._open(relative)
        table = self._table(relative, DOCUMENTS.names, 0, file.metadata.num_rows)
        rows = table.filter(pc.field("document") == number).to_pylist()
        if not rows:
            raise self._damaged(f"no document {number}", self.manifest.folder / relative)
        return rows[0]
