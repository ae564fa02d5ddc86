"""The activation store: MLP inputs and outputs of every layer for the tokens of a corpus, BOS excluded.

With another hookpoint than mlp: what is there, in some layers of one model or two, as inputs alone.

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
from circuitmill.stores.activation_shard import ActivationShard, ShardBlocks
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import NAME, Manifest, load_manifest
from circuitmill.stores.normalization import Normalization, load_normalization
from circuitmill.stores.rows import Rows

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


@dataclass(frozen=True)
class _OpenFile:
    """One file of a shard in memory, as it is stored but in corpus order."""

    shard: ActivationShard
    file: int
    places: tuple[str, ...]
    rows: Rows
    where: dict[str, Int[np.ndarray, " token"]]

    def decoded(self, place: str, low: int, high: int) -> Float[Tensor, "token layer d_model"]:
        """Activations of rows [low, high) of the file."""
        codec = self.shard.codec
        stored = {name: torch.from_numpy(self.rows[place, name][low:high]) for name in codec.arrays()}
        return codec.decode(stored, self.shard.channels[place])


class ActivationStore:
    """All shards of a cache, by split."""

    def __init__(
        self, shards: dict[str, list[ActivationShard]], normalization: Normalization, manifest: Manifest
    ) -> None:
        self._shards, self.normalization, self.manifest = shards, normalization, manifest
        first = shards["train"][0]
        self.n_layers, self.d_model = first.codec.n_layers, first.codec.d_model
        self._last: _OpenFile | None = None
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
        listed = json.loads(manifest.checked_file(SHARDS).read_text())
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
        return cls(shards, load_normalization(manifest.checked_file(NORMALIZATION)), manifest)

    def n_tokens(self, split: str) -> int:
        """Stored tokens of a split."""
        return self._starts[split][-1]

    def shards(self, split: str) -> list[ActivationShard]:
        """The shards of a split, in corpus order."""
        return self._shards[split]

    def read(self, split: str, start: int, stop: int, *, outputs: bool = True) -> ActivationRows:
        """Activations of tokens [start, stop) of a split, in corpus order.

        Tokens of one sequence are neighbours. `outputs=False` leaves the outputs out and reads half as much.

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
        places = ("inputs", "outputs") if outputs else ("inputs",)
        shards = self._shards[split]
        missing = set(places) - set(shards[0].places)
        if missing:
            raise StoreError(
                f"stored {', '.join(missing)}",
                found=f"a cache of {', '.join(shards[0].places)} alone",
                where=self.manifest.folder,
                fix="set cache.targets=stored; with another hookpoint than mlp read inputs alone, which are what is "
                "reconstructed",
            )
        parts = [
            (self._open(shard, file, places), low, high) for shard, file, low, high in self._spans(split, start, stop)
        ]
        columns = {
            name: np.concatenate([part.where[name][low:high] for part, low, high in parts])
            for name in ("sequence", "position", "token_id")
        }
        decoded = {place: torch.cat([part.decoded(place, low, high) for part, low, high in parts]) for place in places}
        return ActivationRows(inputs=decoded["inputs"], outputs=decoded.get("outputs"), **columns)

    def _spans(self, split: str, start: int, stop: int) -> Iterator[tuple[ActivationShard, int, int, int]]:
        """The files that hold some tokens: shard, number of the file, first and one past the last row in it."""
        starts = self._starts[split]
        first = bisect_right(starts, start) - 1
        for shard, offset in zip(self._shards[split][first:], starts[first:], strict=False):
            if offset >= stop:
                return
            low, high = max(start - offset, 0), min(stop - offset, shard.n_tokens)
            for file in range(low // shard.file_rows, -(-high // shard.file_rows)):
                base = file * shard.file_rows
                yield shard, file, max(low - base, 0), min(high - base, shard.file_rows)

    def _open(self, shard: ActivationShard, file: int, places: tuple[str, ...]) -> _OpenFile:
        """A file in corpus order; the last one stays in memory, because the next read goes on in it."""
        last = self._last
        if last is None or (last.shard, last.file, last.places) != (shard, file, places):
            last = _OpenFile(shard, file, places, *shard.read_file(file, places))
            self._last = last
        return last

    def batches(
        self, *, seed: int, batch_tokens: int, pool_tokens: int, split: str = "train", rows: slice | None = None
    ) -> BatchSource:
        """Shuffled batches of a split; see `BatchSource`.

        Raises:
            ConfigError: the split is smaller than a batch, or the pool is.
        """
        blocks = ShardBlocks(self._shards[split])
        return BatchSource(blocks, seed=seed, batch_tokens=batch_tokens, pool_tokens=pool_tokens, rows=rows)


def shard_paths(out: Path, units: tuple[str, ...]) -> list[Path]:
    """Manifest paths of the shards below a cache folder."""
    return [out / "shard" / name / NAME for name in units]
