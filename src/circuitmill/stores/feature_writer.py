"""Writing the tables of features.py."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int

from circuitmill.core.block import LogitWeights
from circuitmill.core.collect import Collector
from circuitmill.errors import StoreError
from circuitmill.stores.feature_windows import WindowRows
from circuitmill.stores.features import FEATURES, GROUP_FEATURES, INDEX_ROWS, WINDOWS, read_checked
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.tokens import write_parquet

PERCENTILES = torch.arange(1, 100, dtype=torch.float64) / 100
_ORDER = [("layer", "ascending"), ("feature", "ascending")]


def window_tables(
    splits: Sequence[WindowRows], texts: Sequence[str], n_features: int, first: int, per_layer: int
) -> Iterator[pa.Table]:
    """The windows of a block's features, `GROUP_FEATURES` features at a time, in the order they are stored.

    Args:
        splits: Rows of each split, sorted by feature.
        texts: The text of every token.
        n_features: Of the block, over all layers.
        first: The block's first feature of each layer.
        per_layer: The block's features of each layer.
    """
    vocabulary = pa.array(texts, pa.string())
    for low in range(0, n_features, GROUP_FEATURES):
        parts = []
        for rows in splits:
            start, stop = np.searchsorted(rows.feature, [low, low + GROUP_FEATURES])
            parts.append(_window_table(rows, slice(int(start), int(stop)), vocabulary, first, per_layer))
        table = pa.concat_tables(parts)
        # stable, so that a feature's windows keep the order of splits, kinds and ranks
        order = np.lexsort((table["feature"].to_numpy(), table["layer"].to_numpy()))
        yield table.take(pa.array(order))


def _window_table(rows: WindowRows, part: slice, vocabulary: pa.Array, first: int, per_layer: int) -> pa.Table:
    feature, length = rows.feature[part], rows.length[part]
    tokens = _ragged(rows.tokens[part], length)
    columns = {
        "layer": feature // per_layer,
        "feature": first + feature % per_layer,
        "split": [rows.split] * len(feature),
        "kind": list(rows.kind[part]),
        "rank": rows.rank[part],
        "quantile": rows.quantile[part],
        "sequence": rows.sequence[part],
        "start": rows.start[part],
        "tokens": tokens,
        "texts": pa.ListArray.from_arrays(tokens.offsets, vocabulary.take(tokens.values)),
        "activations": _ragged(rows.activations[part], length),
        "peak": rows.peak[part],
        "word": list(rows.word[part]),
        "before": list(rows.before[part]),
    }
    return pa.table([_column(columns[field.name], field) for field in WINDOWS], schema=WINDOWS)


def _column(values: Any, field: pa.Field) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array.cast(field.type)


def _ragged(values: np.ndarray, lengths: Int[np.ndarray, " item"]) -> pa.ListArray:
    """Rows of different lengths out of a padded matrix."""
    inside = np.arange(values.shape[1]) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[inside]))


def features_table(
    collector: Collector, logits: LogitWeights, texts: Sequence[str], *, first: int, per_layer: int, n_bars: int
) -> pa.Table:
    """A block's features, sorted by layer and feature; `row_group` is -1 throughout.

    Args:
        collector: Of the train split.
        logits: What the features promote and suppress.
        texts: The text of every token.
        first: The block's first feature of each layer.
        per_layer: The block's features of each layer.
        n_bars: Most bars in a histogram.
    """
    number = np.arange(collector.n_features)
    n_active = collector.n_active.cpu().numpy()
    mean = collector.total.cpu().numpy() / np.maximum(n_active, 1)
    bars = [collector.histogram.bars(feature, n_bars) for feature in number.tolist()]
    shares = PERCENTILES.to(collector.n_active.device)
    percentiles = collector.histogram.quantiles(shares).cpu().tolist()
    columns = {
        "layer": number // per_layer,
        "feature": first + number % per_layer,
        "density": n_active / max(collector.n_tokens, 1),
        "n_active": n_active,
        "act_max": collector.histogram.maximum.cpu().numpy(),
        "act_mean": mean,
        "histogram": [counts for counts, _ in bars],
        "histogram_edges": [edges for _, edges in bars],
        "quantile_values": [values if n else [] for values, n in zip(percentiles, n_active, strict=True)],
        "top_logits": _logit_column(logits.top_tokens.tolist(), logits.top.tolist(), texts),
        "bottom_logits": _logit_column(logits.bottom_tokens.tolist(), logits.bottom.tolist(), texts),
        "row_group": np.full(len(number), -1),
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in FEATURES], schema=FEATURES)


def _logit_column(tokens: list[list[int]], values: list[list[float]], texts: Sequence[str]) -> pa.Array:
    rows = [
        [{"token": token, "text": texts[token], "value": value} for token, value in zip(*row, strict=True)]
        for row in zip(tokens, values, strict=True)
    ]
    return pa.array(rows, FEATURES.field("top_logits").type)


def with_row_groups(table: pa.Table, groups: Sequence[int], has_windows: Bool[np.ndarray, " feature"]) -> pa.Table:
    """A block's features with the row group of their windows, -1 for a feature without any.

    Args:
        table: From `features_table`.
        groups: From `write_windows`.
        has_windows: By number of the feature in the block.
    """
    group = np.repeat(np.asarray(groups), GROUP_FEATURES)[: table.num_rows]
    column = pa.array(np.where(has_windows, group, -1), pa.int32())
    return table.set_column(table.schema.get_field_index("row_group"), "row_group", column)


def write_windows(path: Path, groups: Iterable[pa.Table]) -> list[int]:
    """Write tables as one row group each; empty ones are skipped.

    Returns:
        The row group of every table, -1 for an empty one.
    """
    numbers: list[int] = []
    written = 0
    with pq.ParquetWriter(path, WINDOWS, compression="zstd", write_page_checksum=True) as writer:
        for table in groups:
            numbers.append(written if table.num_rows else -1)
            if table.num_rows:
                writer.write_table(table.cast(WINDOWS), row_group_size=table.num_rows)
                written += 1
    return numbers


def write_index(
    blocks: dict[str, Manifest], index_path: Path, blocks_path: Path, n_layers: int, n_features: int
) -> Float[np.ndarray, " feature"]:
    """Join blocks by writing their index and their digests.

    Returns:
        The density of every feature of every layer.

    Raises:
        StoreError: a block is damaged, or the blocks together lack a feature or have one twice.
    """
    parts, density = [], []
    for name, manifest in blocks.items():
        table = read_checked(manifest.file("features.parquet"), ["layer", "feature", "row_group", "density"])
        density.append(table["density"].to_numpy())
        column = pa.array([name] * table.num_rows, pa.string())
        parts.append(table.append_column("block", column).select(INDEX_ROWS.names).cast(INDEX_ROWS))
    index = pa.concat_tables(parts).sort_by(_ORDER)
    number = index["layer"].to_numpy().astype(np.int64) * n_features + index["feature"].to_numpy()
    if not np.array_equal(number, np.arange(n_layers * n_features)):
        raise StoreError(
            f"{n_layers} x {n_features} features, each in one block",
            found=f"{len(number)} rows for {len(np.unique(number))} features",
            where=index_path.parent / "block",
            fix="delete the folder and rerun stage features",
        )
    write_parquet(index_path, index, index.num_rows)
    digests = [{"name": name, "digest": manifest.digest} for name, manifest in blocks.items()]
    atomic_write(blocks_path, json.dumps(digests, indent=1) + "\n")
    return np.concatenate(density)
