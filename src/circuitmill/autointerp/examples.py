"""The windows of a feature, as the explainer and the scorers take them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float

_WINDOW_ORDER = ("layer", "feature", "split", "kind", "rank", "quantile", "sequence", "start")


@dataclass(frozen=True)
class Window:
    """A short stretch of text with a feature's activation at every token."""

    texts: tuple[str, ...]
    activations: Float[np.ndarray, " pos"]

    @property
    def fires(self) -> bool:
        """Whether the feature fires anywhere in it."""
        return bool((self.activations > 0).any())


@dataclass(frozen=True)
class Logit:
    """How much a feature's decoder raises the logit of a token."""

    text: str
    value: float


@dataclass(frozen=True)
class Examples:
    """Everything that is known about one feature before it has an explanation."""

    layer: int
    feature: int
    n_active: int
    """Tokens it fired on when features were collected."""
    train: tuple[Window, ...]
    """Windows to explain from."""
    heldout: tuple[Window, ...]
    """Windows to score on."""
    top_logits: tuple[Logit, ...]
    """Largest first."""
    bottom_logits: tuple[Logit, ...]
    """Smallest first."""


def examples_of(features: pa.Table, windows: pa.Table) -> Iterator[Examples]:
    """One feature after the other, in order of layer and feature.

    Args:
        features: Rows of features.parquet.
        windows: Rows of windows.parquet, in any order.
    """
    windows = windows.select(list({*_WINDOW_ORDER, "texts", "activations"}))
    windows = windows.sort_by([(name, "ascending") for name in _WINDOW_ORDER]).combine_chunks()
    rows = features.select(["layer", "feature", "n_active", "top_logits", "bottom_logits"])
    rows = rows.sort_by([("layer", "ascending"), ("feature", "ascending")])
    keys = _key(windows)
    starts = np.searchsorted(keys, _key(rows), side="left")
    stops = np.searchsorted(keys, _key(rows), side="right")
    for row, start, stop in zip(rows.to_pylist(), starts, stops, strict=True):
        splits = _windows(windows.slice(int(start), int(stop - start)))
        yield Examples(
            layer=row["layer"],
            feature=row["feature"],
            n_active=row["n_active"],
            train=tuple(window for split, window in splits if split == "train"),
            heldout=tuple(window for split, window in splits if split == "heldout"),
            top_logits=_logits(row["top_logits"]),
            bottom_logits=_logits(row["bottom_logits"]),
        )


def _key(table: pa.Table) -> np.ndarray:
    layer, feature = (table.column(name).to_numpy().astype(np.int64) for name in ("layer", "feature"))
    return (layer << 32) | feature


def _windows(table: pa.Table) -> list[tuple[str, Window]]:
    if not len(table):
        return []
    texts = table.column("texts").combine_chunks()
    activations = table.column("activations").combine_chunks()
    flat_texts = texts.flatten().to_pylist()
    flat_activations = activations.flatten().to_numpy(zero_copy_only=False)
    offsets = texts.offsets.to_numpy()
    ends = (offsets[1:] - offsets[0]).tolist()
    return [
        (split, Window(tuple(flat_texts[start:stop]), flat_activations[start:stop]))
        for split, start, stop in zip(table.column("split").to_pylist(), [0, *ends[:-1]], ends, strict=True)
    ]


def _logits(entries: Sequence[dict]) -> tuple[Logit, ...]:
    return tuple(Logit(entry["text"], entry["value"]) for entry in entries)
