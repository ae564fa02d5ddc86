"""Activations computed when they are asked for, in the form in which a cache on disk gives them.

Sequences of a split are run in batches that are cut from its start, whatever range is asked for, so that a token's
numbers do not depend on how it was asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from circuitmill.errors import DivergedError, StoreError
from circuitmill.lm.load import LanguageModel
from circuitmill.lm.sites import Captured, Sites, mlp_sites


@runtime_checkable
class Located(Protocol):
    """Something in a folder, for messages: the manifest of stage cache."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...


@dataclass(frozen=True)
class LiveRows:
    """Activations of consecutive tokens, with where each token stands."""

    inputs: Float[Tensor, "token layer d_model"]
    """In float32, on the model's device; so are outputs."""
    outputs: Float[Tensor, "token layer d_model"] | None
    """None if they were not asked for."""
    sequence: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    token_id: Int[np.ndarray, " token"]


def token_activations(sites: Sites, tokens: Int32[np.ndarray, "sequence pos"], bos_id: int) -> Captured:
    """Activations of the tokens of some sequences, one sequence after the other, without BOS.

    Returns:
        What is read and what is to be written (None if it is the same), in the models' precision, on their device.

    Raises:
        ConfigError: the sequences are longer than the model's context, or its architecture is unknown.
        DivergedError: an activation is not finite.
        ShapeError: an activation is not of the model's width.
    """
    captured = sites(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(tokens != bos_id))
    for what, values in zip(("inputs", "outputs"), captured, strict=True):
        if values is None:
            continue
        finite = torch.isfinite(values).all(dim=2).all(dim=0).tolist()
        if not all(finite):
            bad = [place for place, good in zip(sites.places, finite, strict=True) if not good]
            raise DivergedError(
                "finite activations",
                found="NaN or infinity",
                where=f"{what} at {', '.join(bad)} of model {sites.name}",
                fix="run the model in float32 (model.dtype) or check its weights",
            )
    return captured


class LiveActivations:
    """What a stage needs of an activation store, from a model in this process; nothing is stored.

    Args:
        lm: A model, whose MLPs' inputs and outputs are meant, or other sites of one or two.
        tokens: By split: the sequences that the cache covers.
        bos_id: The token that is left out.
        batch_sequences: Sequences in one forward pass.
        manifest: Of stage cache.
    """

    def __init__(
        self,
        lm: LanguageModel | Sites,
        tokens: Mapping[str, Int32[np.ndarray, "sequence pos"]],
        *,
        bos_id: int,
        batch_sequences: int,
        manifest: Located,
    ) -> None:
        self._sites = lm if isinstance(lm, Sites) else mlp_sites(lm)
        self._tokens, self._bos_id, self.manifest = tokens, bos_id, manifest
        self._batch_sequences = batch_sequences
        # tokens up to the end of each sequence, with a zero in front
        self._ends = {
            split: np.concatenate([[0], np.cumsum((rows != bos_id).sum(axis=1))]) for split, rows in tokens.items()
        }
        self._last: tuple[tuple[str, int], Captured] | None = None

    def n_tokens(self, split: str) -> int:
        """Tokens of a split, BOS excluded."""
        return int(self._ends[split][-1])

    def read(self, split: str, start: int, stop: int, *, outputs: bool = True) -> LiveRows:
        """Activations of tokens [start, stop) of a split, in corpus order.

        The last batch that was computed is kept, so that reading on from where the last read ended computes none twice.

        Raises:
            DivergedError: an activation is not finite.
            StoreError: outside the split, or outputs where what is read is what is reconstructed.
        """
        if outputs and self._sites.hookpoint != "mlp":
            raise StoreError(
                f"inputs to be read alone: with hookpoint {self._sites.hookpoint} they are what is reconstructed",
                found="outputs asked for",
                where=self.manifest.folder,
                fix="read with outputs=False",
            )
        if not 0 <= start < stop <= self.n_tokens(split):
            raise StoreError(
                f"tokens within 0 to {self.n_tokens(split)}",
                found=f"{start} to {stop}",
                where=f"{self.manifest.folder}, split {split}",
                fix="read inside the split",
            )
        ends, size = self._ends[split], self._batch_sequences
        first, last = (int(at) // size for at in np.searchsorted(ends, [start, stop - 1], side="right") - 1)
        parts: list[Captured] = []
        for number in range(first, last + 1):
            low, high = ends[number * size], ends[min((number + 1) * size, len(ends) - 1)]
            rows = slice(int(max(start - low, 0)), int(min(stop, high) - low))
            x, y = self._batch(split, number)
            parts.append((x[rows], None if y is None else y[rows]))
        sequences = self._tokens[split][first * size : (last + 1) * size]
        sequence, position = np.nonzero(sequences != self._bos_id)
        wanted = slice(start - int(ends[first * size]), stop - int(ends[first * size]))
        sequence, position = sequence[wanted], position[wanted]
        return LiveRows(
            inputs=torch.cat([x for x, _ in parts]).to(torch.float32),
            outputs=torch.cat([y for _, y in parts if y is not None]).to(torch.float32) if outputs else None,
            sequence=sequence + first * size,
            position=position,
            token_id=sequences[sequence, position],
        )

    def _batch(self, split: str, number: int) -> Captured:
        key = (split, number)
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its memory before the next one needs as much
            size = self._batch_sequences
            tokens = self._tokens[split][number * size : (number + 1) * size]
            self._last = (key, token_activations(self._sites, tokens, self._bos_id))
        return self._last[1]
