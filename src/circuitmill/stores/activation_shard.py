"""Reading one shard of activations, with nothing believed that has not been checked.

On opening, the metadata files are compared with the manifest's checksums; before each read, the files that it touches
must have the manifest's sizes (Zarr takes an absent file for zeros); in each read Zarr verifies the crc32c of every
chunk.
"""

import json

import numpy as np
import torch
import zarr
import zarr.errors
from jaxtyping import Float, Shaped
from torch import Tensor
from zarr.core.array import Array

from circuitmill.errors import StoreError
from circuitmill.stores.activation_schema import GROUP, PLACES, SCHEMA_VERSION, array_of, file_of
from circuitmill.stores.files import sha256_file
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.quantize import Codec

_READ_ERRORS = (ValueError, TypeError, RuntimeError, OSError, LookupError, zarr.errors.BaseZarrError)
"""What Zarr and its codecs raise on damaged bytes."""

Stored = dict[str, Tensor]


class ActivationShard:
    """One shard: codes, scales and provenance of a run of tokens."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._path = manifest, manifest.folder / GROUP
        self.name, self.n_tokens = manifest.unit, int(manifest.counts["tokens"])
        self._check_metadata()
        attributes = json.loads((self._path / "zarr.json").read_text())["attributes"]
        if attributes["schema_version"] != SCHEMA_VERSION:
            raise StoreError(
                f"activations of schema version {SCHEMA_VERSION}",
                found=attributes["schema_version"],
                where=self._path,
                fix="rerun stage cache with this version of circuitmill",
            )
        self.attributes: dict = attributes
        group = zarr.open_group(self._path, mode="r")
        self.codec = Codec(
            attributes["codec"],
            int(attributes["n_layers"]),
            int(attributes["d_model"]),
            int(attributes.get("group_channels", 0)),
        )
        self._arrays: dict[str, Array] = {
            name: array_of(group, name)
            for name in [
                *("sequence", "position", "token_id"),
                *(f"{place}/{array}" for place in PLACES for array in self.codec.arrays()),
            ]
        }
        self.chunk = self._arrays[f"inputs/{self.codec.main_array()}"].chunks[0]
        self._channels: dict[str, Tensor] = {}
        if self.codec.name == "int8":
            for place in PLACES:
                name = f"{place}/channel_scale"
                self._arrays[name] = array_of(group, name)
                self._channels[place] = torch.from_numpy(self._read(name, 0, self.codec.n_layers))

    def _fix(self) -> str:
        return (
            f"delete {self._manifest.folder} and run the workflow again: only shard {self.name} and what follows "
            "is made anew"
        )

    def _check_metadata(self) -> None:
        for relative, entry in self._manifest.files.items():
            path = self._manifest.folder / relative
            if path.name == "zarr.json" and (not path.is_file() or sha256_file(path) != entry["sha256"]):
                raise StoreError(
                    f"sha256 {entry['sha256']}",
                    found="other content" if path.is_file() else "no such file",
                    where=path,
                    fix=self._fix(),
                )

    def _read(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        array = self._arrays[name]
        rows, chunk = (array.shards or array.chunks)[0], array.chunks[0]
        where = f"{self._path}, array {name}, chunks {start // chunk} to {(stop - 1) // chunk}"
        for index in range(start // rows, (stop - 1) // rows + 1):
            relative = f"{GROUP}/{name}/{file_of(index, array.ndim)}"
            path, expected = self._manifest.folder / relative, self._manifest.files.get(relative, {}).get("bytes")
            size = path.stat().st_size if path.is_file() else None
            if size is None or size != expected:
                raise StoreError(
                    f"a file of {expected} bytes",
                    found="no such file" if size is None else f"{size} bytes",
                    where=f"{where}, file {relative}",
                    fix=self._fix(),
                )
        try:
            return np.asarray(array[start:stop])
        except _READ_ERRORS as error:
            raise StoreError(
                "chunks whose checksums match",
                found=f"{type(error).__name__}: {error}",
                where=where,
                fix=self._fix(),
            ) from error

    def provenance(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " token"]:
        """One of sequence, position and token_id for a run of tokens.

        Raises:
            StoreError: damaged.
        """
        return self._read(name, start, stop)

    def stored(self, place: str, start: int, stop: int) -> Stored:
        """What the codec stored for a run of tokens.

        Args:
            place: "inputs" or "outputs".

        Raises:
            StoreError: damaged.
        """
        return {name: torch.from_numpy(self._read(f"{place}/{name}", start, stop)) for name in self.codec.arrays()}

    def channel(self, place: str) -> Float[Tensor, "layer d_model"] | None:
        """Channel scales of this shard; None for a codec without."""
        return self._channels.get(place)

    def decoded(self, place: str, start: int, stop: int) -> Float[Tensor, "token layer d_model"]:
        """Activations in float32 for a run of tokens.

        Raises:
            StoreError: damaged.
        """
        return self.codec.decode(self.stored(place, start, stop), self.channel(place))
