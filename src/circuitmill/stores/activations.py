"""The activation store: MLP inputs and outputs of every layer for the tokens of a corpus, BOS excluded.

A cache folder holds `normalization.safetensors` (normalization.py), `shards.json` and one folder per shard under
`shard/` with its own manifest and a Zarr group (activation_schema.py). The tokens of a split are those of its shards
one after the other, in corpus order.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.errors import StoreError, UpstreamError
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import NAME, Manifest, load_manifest
from circuitmill.stores.normalization import Normalization, load_normalization

SHARDS = "shards.json"
NORMALIZATION = "normalization.safetensors"


@dataclass(frozen=True)
class ActivationRows:
    """Activations of consecutive tokens, with where each token stands."""

    inputs: Float[Tensor, "token layer d_model"]
    outputs: Float[Tensor, "token layer d_model"] | None
    sequence: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    token_id: Int[np.ndarray, " token"]


class ActivationStore:
    """All shards of a cache, by split."""

    def __init__(
        self, shards: dict[str, list[ActivationShard]], normalization: Normalization, manifest: Manifest
    ) -> None:
        self._shards, self.normalization, self.manifest = shards, normalization, manifest
        first = shards["train"][0]
        self.n_layers, self.d_model = first.codec.n_layers, first.codec.d_model
        self._starts = {
            split: list(accumulate((shard.n_tokens for shard in parts), initial=0)) for split, parts in shards.items()
        }

    @classmethod
    def open(cls, manifest: Manifest) -> "ActivationStore":
        """Open the cache that a manifest describes.

        Args:
            manifest: Of stage cache as a whole (not of a shard).

        Raises:
            UpstreamError: a shard is missing, or not the one that the manifest was made with.
            StoreError: metadata is damaged.
        """
        listed = json.loads(manifest.file(SHARDS).read_text())
        shards: dict[str, list[ActivationShard]] = {}
        for entry in listed:
            unit = load_manifest(manifest.folder / "shard" / entry["name"] / NAME, "cache", entry["name"])
            if unit.digest != entry["digest"]:
                raise UpstreamError(
                    f"shard {entry['name']} with digest {entry['digest'][:12]}",
                    found=unit.digest[:12],
                    where=unit.folder / NAME,
                    fix="run stage cache again to gather its shards",
                )
            shards.setdefault(entry["split"], []).append(ActivationShard(unit))
        return cls(shards, load_normalization(manifest.file(NORMALIZATION)), manifest)

    def n_tokens(self, split: str) -> int:
        """Stored tokens of a split."""
        return self._starts[split][-1]

    def shards(self, split: str) -> list[ActivationShard]:
        """The shards of a split, in corpus order."""
        return self._shards[split]

    def read(self, split: str, start: int, stop: int, *, outputs: bool = True) -> ActivationRows:
        """Activations of tokens [start, stop) of a split, in corpus order.

        Tokens of one sequence are neighbours. `outputs=False` leaves the MLP outputs out and reads half as much.

        Raises:
            StoreError: outside the split, or damaged.
        """
        if not 0 <= start < stop <= self.n_tokens(split):
            raise StoreError(
                f"tokens within 0 to {self.n_tokens(split)}",
                found=f"{start} to {stop}",
                where=f"{self.manifest.folder}, split {split}",
                fix="read inside the split",
            )
        parts = list(self._parts(split, start, stop))
        columns = {
            name: np.concatenate([shard.provenance(name, low, high) for shard, low, high in parts])
            for name in ("sequence", "position", "token_id")
        }
        return ActivationRows(
            inputs=torch.cat([shard.decoded("inputs", low, high) for shard, low, high in parts]),
            outputs=torch.cat([shard.decoded("outputs", low, high) for shard, low, high in parts]) if outputs else None,
            **columns,
        )

    def _parts(self, split: str, start: int, stop: int) -> Iterator[tuple[ActivationShard, int, int]]:
        starts = self._starts[split]
        first = bisect_right(starts, start) - 1
        for shard, offset in zip(self._shards[split][first:], starts[first:], strict=False):
            if offset >= stop:
                return
            yield shard, max(start - offset, 0), min(stop - offset, shard.n_tokens)

    def batches(self, *, seed: int, batch_tokens: int, pool_tokens: int, split: str = "train") -> BatchSource:
        """Shuffled batches of a split; see `BatchSource`.

        Raises:
            ConfigError: the split is smaller than a batch, or the pool is.
        """
        return BatchSource(self._shards[split], seed=seed, batch_tokens=batch_tokens, pool_tokens=pool_tokens)


def shard_paths(out: Path, units: tuple[str, ...]) -> list[Path]:
    """Manifest paths of the shards below a cache folder."""
    return [out / "shard" / name / NAME for name in units]
