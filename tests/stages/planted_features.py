"""A finished stage features in which causes are planted."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tests.autointerp.planted import Plant, windows

from circuitmill.autointerp.examples import Window
from circuitmill.stores.feature_writer import write_index
from circuitmill.stores.features import BLOCKS, FEATURES, INDEX, WINDOWS
from circuitmill.stores.manifest import NAME, Manifest, StageOutput

N_LAYERS, N_FEATURES, N_BLOCKS = 2, 4, 2


@dataclasses.dataclass(frozen=True)
class Options:
    """Stands for the configuration of stage features."""

    blocks: int = N_BLOCKS


def of_word(word: str) -> Plant:
    return lambda texts, at: float(texts[at] == word)


def feature_of(layer: int, feature: int) -> tuple[str, Plant | None]:
    """Kind of feature and cause: (0, 0) fires on digits, (1, 3) is dead, (1, 2) rare, the others fire on a word."""
    if (layer, feature) == (0, 0):
        return "digits", lambda texts, at: 1.0 + texts[at].isdigit() if texts[at].strip().isdigit() else 0.0
    if (layer, feature) == (1, 3):
        return "dead", None
    if (layer, feature) == (1, 2):
        return "rare", of_word(" Salem")
    return "word", of_word([" of", " is", " the", "The", " where", " Anna"][layer * 3 + feature - 1])


def _window_rows(layer: int, feature: int) -> list[dict]:
    kind, plant = feature_of(layer, feature)
    if plant is None:
        return []
    rows = []
    for number, split in enumerate(("train", "heldout")):
        count = 1 if kind == "rare" else 8
        found = windows(plant, seed=100 * layer + 10 * feature + number, length=12, firing=count, silent=count)
        rows += [_window_row(layer, feature, split, rank, window) for rank, window in enumerate(found)]
    return rows


def _window_row(layer: int, feature: int, split: str, rank: int, window: Window) -> dict:
    return {
        **{"layer": layer, "feature": feature, "split": split, "kind": "top" if window.fires else "silent"},
        **{"rank": rank, "quantile": -1, "sequence": rank, "start": 0, "tokens": [0] * len(window.texts)},
        **{"texts": list(window.texts), "activations": window.activations.tolist()},
        **{"peak": int(window.activations.argmax()) if window.fires else -1, "word": "", "before": ""},
    }


def _feature_row(layer: int, feature: int) -> dict:
    kind, _ = feature_of(layer, feature)
    top = [(" Texas", 3.0), (" a", 0.52), (" b", 0.51), (" c", 0.5)]
    return {
        **{"layer": layer, "feature": feature, "density": 0.0 if kind == "dead" else 0.01},
        **{"n_active": {"dead": 0, "rare": 1}.get(kind, 500), "act_max": 2.0, "act_mean": 1.0},
        **{"histogram": [], "histogram_edges": [], "quantile_values": [], "row_group": -1 if kind == "dead" else 0},
        "top_logits": [{"token": token, "text": text, "value": value} for token, (text, value) in enumerate(top)],
        "bottom_logits": [{"token": 9, "text": " z", "value": -0.5}],
    }


def make_features(out: Path, n_tokens: int = 50_000) -> Manifest:
    """Write the stage with its blocks."""
    cfg, blocks = Options(), {}
    per_block = N_FEATURES // N_BLOCKS
    for block in range(N_BLOCKS):
        name = f"{block:04d}"
        output = StageOutput("features", cfg, {}, out / "block" / name, unit=name)
        here = [(layer, block * per_block + feature) for layer in range(N_LAYERS) for feature in range(per_block)]
        features = pa.Table.from_pylist([_feature_row(*key) for key in here], FEATURES)
        rows = pa.Table.from_pylist([row for key in here for row in _window_rows(*key)], WINDOWS)
        pq.write_table(features, output.path("features.parquet"))
        pq.write_table(rows, output.path("windows.parquet"))
        blocks[name] = output.finish({})
    output = StageOutput("features", cfg, {}, out, keep=("block",))
    write_index(blocks, output.path(INDEX), output.path(BLOCKS), N_LAYERS, N_FEATURES)
    return output.finish({"n_layers": N_LAYERS, "n_features": N_FEATURES, "tokens": {"train": n_tokens}})


def manifest_path(manifest: Manifest) -> Path:
    return manifest.folder / NAME
