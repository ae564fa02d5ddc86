"""Activations in pieces of whole sequences, with the texts they were made from.

Windows are fixed stretches of `window` positions of a sequence, the last one shorter if the context is no multiple;
window w of sequence s has the number s * windows_per_sequence + w.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.tokens import TokenStore


@runtime_checkable
class TokenRows(Protocol):
    """MLP inputs of consecutive tokens, with where each token stands."""

    @property
    def inputs(self) -> Float[Tensor, "token layer d_model"]:
        """What features read."""
        ...

    @property
    def sequence(self) -> Int[np.ndarray, " token"]:
        """Number of the sequence in the split."""
        ...

    @property
    def position(self) -> Int[np.ndarray, " token"]:
        """Position in the sequence."""
        ...

    @property
    def token_id(self) -> Int[np.ndarray, " token"]:
        """The token itself."""
        ...


@runtime_checkable
class Located(Protocol):
    """Something in a folder."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...


@runtime_checkable
class Activations(Protocol):
    """Activations by split in corpus order, BOS excluded: of an activation store, or of a model that runs."""

    @property
    def manifest(self) -> Located:
        """Of stage cache."""
        ...

    def n_tokens(self, split: str) -> int:
        """Tokens of a split."""
        ...

    def read(self, split: str, start: int, stop: int, *, outputs: bool = True) -> TokenRows:
        """Activations of tokens [start, stop) of a split."""
        ...


@dataclass(frozen=True)
class Piece:
    """Activations of consecutive, whole sequences."""

    inputs: Float[Tensor, "token layer d_model"]
    token_id: Int[np.ndarray, " token"]
    window: Int[np.ndarray, " token"]
    """Number of the window that each token lies in."""
    starts: Bool[np.ndarray, " token"]
    """True where a document or a sequence starts."""
    first_sequence: int
    sequences: Int[np.ndarray, "sequence pos"]
    """Token ids of the whole sequences, BOS included."""
    token_at: Int[np.ndarray, "sequence pos"]
    """Which token of `inputs` stands at a position; -1 at BOS."""


class Pieces:
    """One split of a cache, cut into pieces; iterating again gives the same pieces.

    Args:
        activations: Of the cache.
        tokens: The store they were made from.
        split: "train" or "heldout".
        max_tokens: At most so many tokens, in whole sequences from the start; None takes all.
        window: Positions in a window.
        piece_tokens: About so many tokens at a time.
    """

    def __init__(
        self,
        activations: Activations,
        tokens: TokenStore,
        split: str,
        *,
        max_tokens: int | None,
        window: int,
        piece_tokens: int,
    ) -> None:
        self._activations, self._tokens = activations, tokens
        self.split, self.window, self.context = split, window, tokens.context
        there = activations.n_tokens(split)
        self.n_tokens = there if max_tokens is None else min(there, max_tokens)
        """At most so many tokens come out: a sequence that passes the limit is left out."""
        self._whole = self.n_tokens == there
        self._step = max(piece_tokens, 2 * tokens.context)
        self.windows_per_sequence = -(-tokens.context // window)
        if window > tokens.context:
            raise ConfigError(
                f"windows of at most {tokens.context} tokens, the length of a sequence",
                found=str(window),
                where="features.window",
                fix="lower features.window",
            )

    def __iter__(self) -> Iterator[Piece]:
        start = 0
        while start < self.n_tokens:
            stop = min(start + self._step, self.n_tokens)
            rows = self._activations.read(self.split, start, stop, outputs=False)
            kept = len(rows.sequence)
            if stop < self.n_tokens or not self._whole:
                # the last sequence may go on after the rows that were read
                kept = int(np.searchsorted(rows.sequence, rows.sequence[-1]))
            if kept == 0:
                if start == 0:
                    raise ConfigError(
                        f"a budget of at least one sequence ({self._tokens.context} tokens)",
                        found=f"{self.n_tokens} tokens",
                        where=f"features.max_{self.split}_tokens",
                        fix="raise the budget, or set null to take all",
                    )
                return
            yield self._piece(rows, kept)
            start += kept

    def _piece(self, rows: TokenRows, kept: int) -> Piece:
        sequence, position, token_id = (
            column[:kept].astype(np.int64) for column in (rows.sequence, rows.position, rows.token_id)
        )
        first = int(sequence[0])
        sequences = self._tokens.read(self.split, first, int(sequence[-1]) + 1).astype(np.int64)
        if not np.array_equal(sequences[sequence - first, position], token_id):
            raise StoreError(
                "cached activations of the token store's own tokens",
                found=f"other tokens in sequences {first} to {int(sequence[-1])} of split {self.split}",
                where=self._activations.manifest.folder,
                fix="run stage cache again on this token store",
            )
        token_at = np.full(sequences.shape, -1, dtype=np.int64)
        token_at[sequence - first, position] = np.arange(kept)
        starts = np.ones(kept, dtype=bool)
        starts[1:] = (np.diff(sequence) != 0) | (np.diff(position) != 1)
        return Piece(
            inputs=rows.inputs[:kept],
            token_id=token_id,
            window=sequence * self.windows_per_sequence + position // self.window,
            starts=starts,
            first_sequence=first,
            sequences=sequences,
            token_at=token_at,
        )
