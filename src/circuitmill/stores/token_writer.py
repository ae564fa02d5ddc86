"""Writing the token store, resumable at every file.

Each finished file of sequences records in the ledger where the next sequence of its split starts, as (document, token
number in it). Because a sequence starts afresh, that is all that is needed to go on: a continued run reads the
sources again, tokenizes only the documents from the earliest of these points on, and writes the same bytes
that an unbroken run would have written.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.packing import Packed, Packer
from circuitmill.stores.tokens import (
    DOCUMENTS,
    SEGMENTS,
    documents_name,
    sequences_name,
    sequences_schema,
    write_parquet,
)

Tokens = Int32[np.ndarray, " token"]


class SplitWriter:
    """Sequences of one split.

    Args:
        max_sequences: Stop there; None takes all.
        per_file: Sequences in a file.
        per_group: Sequences in a row group.
    """

    def __init__(
        self,
        out: StageOutput,
        split: str,
        packer: Packer,
        *,
        context: int,
        max_sequences: int | None,
        per_file: int,
        per_group: int,
    ) -> None:
        self._out, self._split, self._packer = out, split, packer
        self._context, self._max, self._per_file, self._per_group = context, max_sequences, per_file, per_group
        self._pending: list[Packed] = []
        self._files, self.resume_document, self._resume_offset, self.tokens = 0, 0, 0, 0
        while (entry := out.ledger.get(self._key(self._files))) is not None:
            self.resume_document, self._resume_offset = entry["document"], entry["offset"]
            self.tokens += entry["tokens"]
            self._files += 1
        self.documents = 0

    def _key(self, index: int) -> str:
        return f"{self._split}-{index:05d}"

    @property
    def n_sequences(self) -> int:
        """Full sequences so far."""
        return self._files * self._per_file + len(self._pending)

    @property
    def full(self) -> bool:
        """Whether the split has all the sequences it may have."""
        return self._max is not None and self.n_sequences >= self._max

    @property
    def dropped(self) -> int:
        """Tokens of the last sequence, which is not full."""
        return 0 if self.full else self._packer.waiting

    def takes(self, document: int) -> bool:
        """Whether a document belongs into this split.

        Those up to the one that completed the last finished file were taken by the run that wrote it.
        """
        return document <= self.resume_document or not self.full

    def needs(self, document: int) -> bool:
        """Whether this run needs the document's tokens to go on."""
        return document >= self.resume_document and not self.full

    def add(self, document: int, tokens: Tokens) -> None:
        """Pack a document and write every file that it completes."""
        offset = self._resume_offset if document == self.resume_document else 0
        for packed in self._packer.add(document, tokens, offset):
            if self.full:
                return
            self._pending.append(packed)
            if len(self._pending) == self._per_file:
                self._write()

    def _write(self) -> None:
        first = self._files * self._per_file
        flat = pa.array(np.concatenate([packed.tokens for packed in self._pending]), pa.int32())
        segments = [
            [{"start": start, "document": document, "offset": offset} for start, document, offset in packed.segments]
            for packed in self._pending
        ]
        table = pa.table(
            [
                pa.array(range(first, first + len(self._pending)), pa.int64()),
                pa.FixedSizeListArray.from_arrays(flat, self._context),
                pa.array(segments, SEGMENTS),
            ],
            schema=sequences_schema(self._context),
        )
        write_parquet(self._out.path(sequences_name(self._split, self._files)), table, self._per_group)
        tokens = sum(packed.n_tokens for packed in self._pending)
        self.tokens += tokens
        if len(self._pending) == self._per_file:
            last = self._pending[-1]
            self._out.ledger.put(
                self._key(self._files), document=last.next_document, offset=last.next_offset, tokens=tokens
            )
            self._files += 1
            self._pending = []

    def finish(self) -> int:
        """Write the last, shorter file, if there is one, and give the number of sequences."""
        count = self.n_sequences
        if self._pending:
            self._write()
        return count


class DocumentsWriter:
    """The documents table. File k holds the documents numbered from k x per_file on.

    Args:
        per_file: Numbers in a file.
    """

    def __init__(self, out: StageOutput, *, per_file: int, keep_text: bool) -> None:
        self._out, self._per_file, self._keep_text = out, per_file, keep_text
        self._rows: list[dict] = []
        self._files = 0
        while out.ledger.get(f"documents-{self._files:05d}") is not None:
            self._files += 1

    @property
    def resume_document(self) -> int:
        """The first document that is not in a finished file."""
        return self._files * self._per_file

    def needs(self, document: int) -> bool:
        """Whether this run must write the document's row."""
        return document >= self.resume_document

    def advance(self, document: int) -> None:
        """Say that documents are numbered from here on: writes the files that are complete."""
        while document >= (self._files + 1) * self._per_file:
            self._write()
            self._out.ledger.put(f"documents-{self._files:05d}")
            self._files += 1

    def add(self, row: dict) -> None:
        """Add a row; documents come in order."""
        self._rows.append(row if self._keep_text else {**row, "text": None})

    def _write(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=DOCUMENTS)
        write_parquet(self._out.path(documents_name(self._files)), table, self._per_file)
        self._rows = []

    def finish(self) -> None:
        """Write the last file."""
        if self._rows:
            self._write()
