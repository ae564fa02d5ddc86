"""Chosen windows of text with the activations of the feature they were chosen for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.core.collect import KINDS, Chosen
from circuitmill.logs import progress
from circuitmill.stores.pieces import Piece, Pieces

Encode = Callable[[Float[Tensor, "token layer d_model"]], Float[Tensor, "token feature"]]
"""From MLP inputs to the activations of a block's features."""
Around = Callable[[Int[np.ndarray, " pos"], int], tuple[str, str]]
"""From a sequence and a position to the word there and the words before."""


@dataclass(frozen=True)
class WindowRows:
    """Windows of one split as columns, sorted by feature, kind and rank."""

    split: str
    feature: Int[np.ndarray, " item"]
    """Number in the block: layer after layer."""
    kind: Sequence[str]
    rank: Int[np.ndarray, " item"]
    quantile: Int[np.ndarray, " item"]
    sequence: Int[np.ndarray, " item"]
    start: Int[np.ndarray, " item"]
    length: Int[np.ndarray, " item"]
    """Tokens in the window; what follows them in the padded columns means nothing."""
    tokens: Int[np.ndarray, "item window"]
    activations: Float[np.ndarray, "item window"]
    """Zero at BOS."""
    peak: Int[np.ndarray, " item"]
    """Index of the largest activation in the window, -1 if the feature is silent."""
    word: list[str]
    """The whole word at the peak; empty if the feature is silent."""
    before: list[str]


def fetch_windows(pieces: Pieces, chosen: Chosen, encode: Encode, around: Around) -> WindowRows:
    """Read a split once more and take out the chosen windows.

    The pieces are those of the pass that chose, so the activations are the same to the last bit.
    """
    sequence, place = np.divmod(chosen.window.numpy(), pieces.windows_per_sequence)
    n_windows, start = len(sequence), place * pieces.window
    rows = WindowRows(
        split=pieces.split,
        feature=chosen.feature.numpy(),
        kind=[KINDS[kind] for kind in chosen.kind.tolist()],
        rank=chosen.rank.numpy(),
        quantile=chosen.quantile.numpy(),
        sequence=sequence,
        start=start,
        length=np.minimum(start + pieces.window, pieces.context) - start,
        tokens=np.zeros((n_windows, pieces.window), dtype=np.int32),
        activations=np.zeros((n_windows, pieces.window), dtype=np.float32),
        peak=np.full(n_windows, -1, dtype=np.int64),
        word=[""] * n_windows,
        before=[""] * n_windows,
    )
    by_sequence = np.argsort(sequence, kind="stable")
    ordered = sequence[by_sequence]
    with progress(f"fetching windows, {pieces.split}", total=n_windows, unit="windows") as bar:
        for piece in pieces:
            last = piece.first_sequence + len(piece.sequences)
            low, high = np.searchsorted(ordered, [piece.first_sequence, last])
            if low < high:
                _fill(rows, by_sequence[low:high], piece, encode, around)
                bar.advance(int(high - low))
    return rows


def _fill(rows: WindowRows, mine: Int[np.ndarray, " item"], piece: Piece, encode: Encode, around: Around) -> None:
    """Fill the rows whose windows lie in a piece."""
    local = rows.sequence[mine] - piece.first_sequence
    pos = rows.start[mine][:, None] + np.arange(rows.tokens.shape[1])
    pos = np.minimum(pos, piece.sequences.shape[1] - 1)
    rows.tokens[mine] = piece.sequences[local[:, None], pos]
    at = torch.from_numpy(piece.token_at[local[:, None], pos])
    encoded = encode(piece.inputs)
    column = torch.from_numpy(rows.feature[mine])[:, None].to(encoded.device)
    found = encoded[at.clamp_min(0).to(encoded.device), column].cpu()
    inside = torch.arange(pos.shape[1]) < torch.from_numpy(rows.length[mine])[:, None]
    rows.activations[mine] = torch.where((at >= 0) & inside, found, 0.0).numpy()
    peak = rows.activations[mine].argmax(axis=1)
    for index, which in enumerate(mine.tolist()):
        if rows.activations[which, peak[index]] > 0:
            rows.peak[which] = peak[index]
            here = int(rows.start[which] + peak[index])
            rows.word[which], rows.before[which] = around(piece.sequences[local[index]], here)
