"""Features with their statistics and example windows: Parquet, one folder per block of features.

    blocks.json            [{"name", "digest"}]: the blocks and the digests of their manifests
    index.parquet          layer, feature, block, row_group
    block/<name>/features.parquet   a row per feature (FEATURES)
    block/<name>/windows.parquet    a row per stored window (WINDOWS), sorted by layer, feature, split, kind, rank

Block b of B holds features [b * F // B, (b + 1) * F // B) of every layer. The windows of a feature are in one row group
of its block's file (`row_group`, -1 if it has none), which holds those of up to 64 features, so that one feature is
read without reading the rest. Pages carry checksums.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from circuitmill.errors import StoreError, UpstreamError
from circuitmill.stores.files import sha256_file
from circuitmill.stores.manifest import NAME, Manifest, load_manifest

BLOCKS = "blocks.json"
INDEX = "index.parquet"
GROUP_FEATURES = 64
"""Features whose windows share a row group."""

_LOGITS = pa.list_(pa.struct([("token", pa.int32()), ("text", pa.string()), ("value", pa.float32())]))
FEATURES = pa.schema(
    [
        ("layer", pa.int16()),
        ("feature", pa.int32()),
        ("density", pa.float64()),
        ("n_active", pa.int64()),
        ("act_max", pa.float32()),
        ("act_mean", pa.float32()),
        ("histogram", pa.list_(pa.int64())),
        ("histogram_edges", pa.list_(pa.float32())),
        ("quantile_values", pa.list_(pa.float32())),
        ("top_logits", _LOGITS),
        ("bottom_logits", _LOGITS),
        ("row_group", pa.int32()),
    ]
)
WINDOWS = pa.schema(
    [
        ("layer", pa.int16()),
        ("feature", pa.int32()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int16()),
        ("quantile", pa.int8()),
        ("sequence", pa.int64()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("texts", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
        ("peak", pa.int32()),
        ("word", pa.string()),
        ("before", pa.string()),
    ]
)
INDEX_ROWS = pa.schema(
    [("layer", pa.int16()), ("feature", pa.int32()), ("block", pa.string()), ("row_group", pa.int32())]
)


def block_span(block: str, n_blocks: int, n_features: int) -> slice:
    """Which features of every layer a block holds.

    >>> block_span("0001", n_blocks=3, n_features=8)
    slice(2, 5, None)
    """
    number = int(block)
    return slice(number * n_features // n_blocks, (number + 1) * n_features // n_blocks)


class FeatureStore:
    """All features of a run, across blocks."""

    def __init__(self, manifest: Manifest, blocks: dict[str, Manifest]) -> None:
        self.manifest = manifest
        self._blocks = blocks
        self._checked: set[Path] = set()
        self.n_layers: int = manifest.counts["n_layers"]
        self.n_features: int = manifest.counts["n_features"]
        """Per layer."""

    @classmethod
    def open(cls, manifest: Manifest) -> "FeatureStore":
        """Open the features that a manifest of the whole stage (not of a block) describes.

        Raises:
            UpstreamError: a block is missing, or not the one that the manifest was made with.
            StoreError: metadata is damaged.
        """
        blocks = {}
        for entry in json.loads(manifest.file(BLOCKS).read_text()):
            unit = load_manifest(manifest.folder / "block" / entry["name"] / NAME, "features", entry["name"])
            if unit.digest != entry["digest"]:
                raise UpstreamError(
                    f"block {entry['name']} with digest {entry['digest'][:12]}",
                    found=unit.digest[:12],
                    where=unit.folder / NAME,
                    fix="run stage features again to gather its blocks",
                )
            blocks[entry["name"]] = unit
        return cls(manifest, blocks)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, in order."""
        return tuple(self._blocks)

    def features(self, block: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The features table of a block, or of all; sorted by layer and feature.

        Raises:
            StoreError: no such block, or a damaged file.
        """
        names = self.blocks if block is None else (block,)
        tables = [read_checked(self._path(name, "features.parquet"), columns) for name in names]
        if len(tables) == 1:
            return tables[0]
        keys = pa.concat_tables(
            [read_checked(self._path(name, "features.parquet"), ["layer", "feature"]) for name in names]
        )
        order = np.lexsort((keys["feature"].to_numpy(), keys["layer"].to_numpy()))
        return pa.concat_tables(tables).take(pa.array(order))

    def windows(self, block: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The windows table of a block.

        Raises:
            StoreError: no such block, or a damaged file.
        """
        return read_checked(self._path(block, "windows.parquet"), columns)

    def windows_of(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """The windows of some features as plain rows, by (layer, feature); only their row groups are read.

        Raises:
            StoreError: an unknown feature, or a damaged file.
        """
        index = read_checked(self.manifest.file(INDEX))
        place = {
            (layer, feature): (block, group)
            for layer, feature, block, group in zip(
                *(index[name].to_pylist() for name in INDEX_ROWS.names), strict=True
            )
        }
        found: dict[tuple[int, int], list[dict[str, Any]]] = {}
        groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for key in wanted:
            if key not in place:
                raise StoreError(
                    f"a layer below {self.n_layers} and a feature below {self.n_features}",
                    found=f"layer {key[0]}, feature {key[1]}",
                    where=self.manifest.folder / INDEX,
                    fix="ask for a feature of this transcoder",
                )
            found[key] = []
            if place[key][1] >= 0:
                groups.setdefault(place[key], []).append(key)
        for (block, group), keys in sorted(groups.items()):
            table = read_checked(self._path(block, "windows.parquet"), group=group)
            numbers = table["layer"].to_numpy().astype(np.int64) * self.n_features + table["feature"].to_numpy()
            wanted_numbers = [layer * self.n_features + feature for layer, feature in keys]
            for row in table.filter(pa.array(np.isin(numbers, wanted_numbers))).to_pylist():
                found[row["layer"], row["feature"]].append(row)
        return found

    def _path(self, block: str, name: str) -> Path:
        """A file of a block, its bytes compared with the manifest the first time."""
        if block not in self._blocks:
            raise StoreError(
                f"one of the blocks {', '.join(self.blocks)}",
                found=block,
                where=self.manifest.folder / BLOCKS,
                fix="ask for a block of this configuration",
            )
        manifest = self._blocks[block]
        path = manifest.file(name)
        if path not in self._checked:
            if sha256_file(path) != manifest.files[name]["sha256"]:
                raise _damaged(path, "other bytes than were written")
            self._checked.add(path)
        return path


def read_checked(path: Path, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
    """Read a table, or one row group of it.

    Raises:
        StoreError: damaged.
    """
    names = None if columns is None else list(columns)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(names) if group is None else file.read_row_group(group, names)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, found: str) -> StoreError:
    return StoreError(
        "a whole Parquet file whose checksums match",
        found=found,
        where=path,
        fix="delete the manifest beside it and rerun stage features",
    )
