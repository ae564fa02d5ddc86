"""Documents into fixed-length sequences: BOS in front of each sequence and between documents."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Packed:
    """A full sequence and where the next one starts."""

    tokens: Int32[np.ndarray, " pos"]
    segments: list[tuple[int, int, int]]
    """(start, document, offset) of each piece."""
    n_tokens: int
    """Tokens of documents, that is without BOS."""
    next_document: int
    next_offset: int
    """The first token that is not in this sequence or an earlier one, as (document, number in it)."""


class Packer:
    """Fills one sequence after the other.

    A sequence starts afresh, with BOS and without memory of the last one, so that packing can be taken up again at
    (document, offset) of any sequence's start. A document that does not fit goes on in the next sequence. If a
    document leaves one position free, BOS fills it.
    """

    def __init__(self, context: int, bos_id: int) -> None:
        self._context, self._bos_id = context, bos_id
        self._start()

    def _start(self) -> None:
        self._tokens = np.empty(self._context, dtype=np.int32)
        self._tokens[0] = self._bos_id
        self._filled = 1
        self._segments: list[tuple[int, int, int]] = []

    @property
    def waiting(self) -> int:
        """Document tokens in the sequence that is not full yet."""
        return int((self._tokens[: self._filled] != self._bos_id).sum())

    def add(self, document: int, tokens: Int32[np.ndarray, " token"], offset: int = 0) -> list[Packed]:
        """Place a document and return the sequences that it completes.

        Args:
            offset: Place the document from this token on.
        """
        full: list[Packed] = []
        if offset < len(tokens) and self._filled > 1:
            self._tokens[self._filled] = self._bos_id
            self._filled += 1
            self._close_if_full(full, document, offset)
        while offset < len(tokens):
            count = min(len(tokens) - offset, self._context - self._filled)
            self._segments.append((self._filled, document, offset))
            self._tokens[self._filled : self._filled + count] = tokens[offset : offset + count]
            self._filled += count
            offset += count
            self._close_if_full(full, document, offset)
        return full

    def _close_if_full(self, full: list[Packed], document: int, offset: int) -> None:
        if self._filled == self._context:
            full.append(Packed(self._tokens, self._segments, self.waiting, document, offset))
            self._start()
