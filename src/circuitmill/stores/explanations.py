"""Explanations of features with their scores: one Parquet table.

    block/<name>/explanations.parquet   a row per feature of the block (EXPLANATIONS)
    explanations.parquet                all of them

Rows are sorted by layer and feature; a row group holds up to 4,096. Pages carry checksums.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from circuitmill.errors import StoreError
from circuitmill.stores.files import sha256_file
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.tokens import write_parquet

FILE = "explanations.parquet"
ROW_GROUP = 4096
"""Rows that are read together."""

EXPLANATIONS = pa.schema(
    [
        ("layer", pa.int16()),
        ("feature", pa.int32()),
        ("explanation", pa.string()),
        ("explainer", pa.string()),
        ("rule", pa.string()),
        ("detection", pa.float32()),
        ("precision", pa.float32()),
        ("recall", pa.float32()),
        ("n_scored", pa.int32()),
        ("words", pa.list_(pa.string())),
        ("promotes", pa.list_(pa.string())),
    ]
)
"""The columns; the four after `explainer` are null, and `n_scored` 0, where there was nothing to score."""

_SORTED = [("layer", "ascending"), ("feature", "ascending")]


def explanations_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows with the columns as keys, as a table."""
    return pa.Table.from_pylist(list(rows), schema=EXPLANATIONS)


def write_explanations(path: Path, table: pa.Table) -> None:
    """Write explanations, sorted, whole or not at all."""
    write_parquet(path, table.sort_by(_SORTED), ROW_GROUP)


class ExplanationStore:
    """The explanations that a manifest of stage interpret describes: of the whole stage, or of one block."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        self._path, self._table = path, table
        layers, features = table["layer"].to_pylist(), table["feature"].to_pylist()
        self._row = {key: number for number, key in enumerate(zip(layers, features, strict=True))}

    @classmethod
    def open(cls, manifest: Manifest) -> "ExplanationStore":
        """Read the explanations.

        Raises:
            StoreError: the file is missing, damaged or has other columns.
        """
        path = manifest.file(FILE)
        found = sha256_file(path)
        if found != manifest.files[FILE]["sha256"]:
            raise _damaged(path, f"other bytes than were written (sha256 {found[:12]})")
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read()
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        if not table.schema.equals(EXPLANATIONS):
            raise _damaged(path, "columns " + ", ".join(table.schema.names))
        return cls(path, table)

    def __len__(self) -> int:
        return len(self._table)

    def table(self) -> pa.Table:
        """All explanations, by layer and feature."""
        return self._table

    def get(self, layer: int, feature: int) -> dict[str, Any]:
        """The row of one feature.

        Raises:
            StoreError: there is none.
        """
        return self.rows([(layer, feature)])[layer, feature]

    def rows(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
        """The rows of some features, by (layer, feature).

        Raises:
            StoreError: one of them is not there.
        """
        keys = list(wanted)
        for layer, feature in keys:
            if (layer, feature) not in self._row:
                raise StoreError(
                    f"an explanation for one of {len(self)} features",
                    found=f"layer {layer}, feature {feature}",
                    where=self._path,
                    fix="ask for a feature of this transcoder, or run stage interpret again",
                )
        rows = self._table.take(pa.array([self._row[key] for key in keys], pa.int64())).to_pylist()
        return dict(zip(keys, rows, strict=True))


def repeated_or_missing(table: pa.Table, n_layers: int, n_features: int) -> str | None:
    """What keeps a table from holding every feature once, in words; None if it does."""
    found = set((table["layer"].to_numpy().astype(np.int64) * n_features + table["feature"].to_numpy()).tolist())
    if len(found) < len(table):
        return f"{len(table) - len(found)} rows for features that have one"
    missing = sorted(set(range(n_layers * n_features)) - found)
    if missing:
        return f"none for {len(missing)} features, the first being layer {missing[0] // n_features}, feature " + str(
            missing[0] % n_features
        )
    if len(found) > n_layers * n_features:
        return f"{len(found)} features"
    return None


def _damaged(path: Path, found: str) -> StoreError:
    return StoreError(
        "explanations as they were written",
        found=found,
        where=path,
        fix="delete the manifest beside the file and run stage interpret again",
    )
