"""Writing one shard of activations, resumable at every file.

The number of tokens is known before the model runs (positions that are not BOS), so all arrays have their final
shape from the start. Activations are gathered until a whole file's worth is there; then every array's file is
written and made durable, and the ledger records it. A kill loses at most one file's worth of work, and the
result is the same bytes as an unbroken run's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.errors import ShapeError
from circuitmill.stores.activation_schema import GROUP, PLACES, PROVENANCE, array_of, create_group, file_of
from circuitmill.stores.files import sync_folder
from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.normalization import Moments, load_moments, merge_moments, moments_of, save_moments
from circuitmill.stores.quantize import Codec, channel_scales, to_numpy

_ERROR_SAMPLE = 8
"""The error of the codec is measured on every eighth token."""


@dataclass(frozen=True)
class Layout:
    """Sizes that do not follow from the codec."""

    chunk: int
    """Tokens in a chunk."""
    chunks_per_file: int
    calibration_tokens: int
    compression_level: int

    @property
    def rows(self) -> int:
        """Tokens in a file."""
        return self.chunk * self.chunks_per_file


class ShardWriter:
    """Takes activations in token order and leaves `activations.zarr` and `moments.safetensors`.

    Args:
        out: The shard's output; its ledger says which files are done.
        provenance: Sequence, position and token id of every token of the shard.
        attributes: Where the numbers come from; stored with the group.
    """

    def __init__(
        self,
        out: StageOutput,
        codec: Codec,
        layout: Layout,
        provenance: dict[str, Int[np.ndarray, " token"]],
        attributes: dict,
    ) -> None:
        self._out, self._codec, self._layout = out, codec, layout
        self._path = out.path(GROUP)
        self._partial = out.path("partial")
        self.n_rows = len(provenance["sequence"])
        self._n_files = -(-self.n_rows // layout.rows)
        self._buffer: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._held = 0
        if out.ledger.get("created") is None:
            self._create(provenance, attributes)
        for leftover in self._path.rglob("*.partial"):
            leftover.unlink()
        self._group = zarr.open_group(self._path, mode="r+")
        self._done = 0
        while self._done < self._n_files and out.ledger.get(self._key(self._done)) is not None:
            self._done += 1

    @staticmethod
    def _key(index: int) -> str:
        return f"file-{index:05d}"

    @property
    def rows_done(self) -> int:
        """Tokens that are written and durable: where to go on."""
        return min(self._done * self._layout.rows, self.n_rows)

    def _create(self, provenance: dict[str, Int[np.ndarray, " token"]], attributes: dict) -> None:
        group = create_group(
            self._path,
            self._codec,
            self.n_rows,
            chunk=self._layout.chunk,
            chunks_per_file=self._layout.chunks_per_file,
            level=self._layout.compression_level,
            attributes=attributes,
        )
        for name, dtype in PROVENANCE.items():
            array_of(group, name)[:] = provenance[name].astype(dtype)
        for path in sorted(self._path.rglob("*")):
            if path.is_file():
                _make_durable(path)
        self._out.ledger.put("created")

    def append(
        self, inputs: Float[Tensor, "token layer d_model"], outputs: Float[Tensor, "token layer d_model"]
    ) -> None:
        """Add the next tokens, following `rows_done` and what was appended since.

        Raises:
            DivergedError: an activation is not finite.
            ShapeError: more tokens than the shard has.
        """
        self._buffer[0].append(inputs)
        self._buffer[1].append(outputs)
        self._held += len(inputs)
        if self.rows_done + self._held > self.n_rows:
            raise ShapeError(
                f"{self.n_rows} tokens in the shard",
                found=f"{self.rows_done + self._held}",
                where=self._path,
                fix="append the activations of this shard's tokens only",
            )
        while self._held and self._held >= min(self._layout.rows, self.n_rows - self.rows_done):
            self._flush()

    def _flush(self) -> None:
        start = self.rows_done
        stop = min(start + self._layout.rows, self.n_rows)
        block = [self._take(kept, stop - start) for kept in self._buffer]
        self._held -= stop - start
        moments = [moments_of(x, place.removesuffix("s")) for x, place in zip(block, PLACES, strict=True)]
        if start == 0 and self._codec.name == "int8":
            for x, place in zip(block, PLACES, strict=True):
                channel = channel_scales(x[: self._layout.calibration_tokens])
                array_of(self._group, f"{place}/channel_scale")[:] = to_numpy(channel)
                _make_durable(self._path / place / "channel_scale" / file_of(0, 2))
        errors = {}
        for x, place in zip(block, PLACES, strict=True):
            errors[place] = self._write(place, x, start, stop)
        save_moments(self._partial / f"{self._key(self._done)}.safetensors", *moments)
        self._out.ledger.put(self._key(self._done), **errors)
        self._done += 1

    @staticmethod
    def _take(kept: list[Tensor], rows: int) -> Float[Tensor, "token layer d_model"]:
        joined = torch.cat(kept) if len(kept) > 1 else kept[0]
        kept[:] = [joined[rows:].clone()] if len(joined) > rows else []
        return joined[:rows]

    def _write(self, place: str, x: Tensor, start: int, stop: int) -> dict[str, list[float]]:
        channel = self._channel(place, x.device)
        encoded = self._codec.encode(x, channel)
        for name, value in encoded.items():
            array = array_of(self._group, f"{place}/{name}")
            array[start:stop] = to_numpy(value)
            _make_durable(self._path / place / name / file_of(self._done, array.ndim))
        sample = x[::_ERROR_SAMPLE].to(torch.float32)
        restored = self._codec.decode({name: value[::_ERROR_SAMPLE] for name, value in encoded.items()}, channel)
        squared = (restored - sample).square().sum(dim=(0, 2)), sample.square().sum(dim=(0, 2))
        return {"error": squared[0].tolist(), "energy": squared[1].tolist()}

    def _channel(self, place: str, device: torch.device) -> Float[Tensor, "layer d_model"] | None:
        if self._codec.name != "int8":
            return None
        return torch.from_numpy(np.asarray(array_of(self._group, f"{place}/channel_scale")[:])).to(device)

    def finish(self) -> dict:
        """Merge the moments of all files and give the counts for the manifest.

        Raises:
            ShapeError: tokens are missing.
        """
        if self._done < self._n_files:
            raise ShapeError(
                f"{self.n_rows} tokens",
                found=f"{self.rows_done + self._held}",
                where=self._path,
                fix="append all of the shard's tokens before finishing",
            )
        paths = [self._partial / f"{self._key(index)}.safetensors" for index in range(self._n_files)]
        self._merge(paths)
        counts: dict = {"tokens": self.n_rows}
        for place in PLACES:
            entries = [(self._out.ledger.get(self._key(index)) or {})[place] for index in range(self._n_files)]
            for key in ("error", "energy"):
                counts[f"{place}_{key}"] = np.sum([entry[key] for entry in entries], axis=0).tolist()
        for path in paths:
            path.unlink(missing_ok=True)
        if self._partial.is_dir():
            self._partial.rmdir()
        return counts

    def _merge(self, paths: Sequence[Path]) -> None:
        merged = self._out.path("moments.safetensors")
        # a run killed between the two steps of finish() has merged, and removed some of the parts
        if self._out.ledger.get("merged") is None:
            parts: list[tuple[Moments, Moments]] = [load_moments(path) for path in paths]
            save_moments(merged, *merge_moments(parts))
            self._out.ledger.put("merged")


def _make_durable(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def nmse(counts: Sequence[dict], place: str) -> list[float]:
    """Mean squared error of the codec per layer, relative to the mean square, over shards.

    Args:
        counts: What `ShardWriter.finish` gave, one per shard.
        place: "inputs" or "outputs".
    """
    error = np.sum([entry[f"{place}_error"] for entry in counts], axis=0)
    energy = np.sum([entry[f"{place}_energy"] for entry in counts], axis=0)
    return (error / np.maximum(energy, np.finfo(np.float64).tiny)).tolist()
