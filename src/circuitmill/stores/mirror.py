"""The rows of metrics.jsonl once more, as a Weights & Biases run in a folder that can be uploaded later."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import wandb


class WandbMirror:
    """Mirrors rows to Weights & Biases: files below `folder`/wandb, no network unless WANDB_MODE is "online".

    A resumed training gives the same `identity`: offline it adds a folder of its own beside the earlier ones, and
    uploading joins them into one run; online it goes on with the run, where steps that are there already stay as they
    are.
    """

    def __init__(self, folder: Path, *, config: dict, identity: str) -> None:
        self._run = wandb.init(
            project="circuitmill",
            id=identity,
            dir=str(folder),
            config=config,
            mode=None if "WANDB_MODE" in os.environ else "offline",
            resume="allow" if os.environ.get("WANDB_MODE") == "online" else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )

    def log(self, row: dict[str, Any]) -> None:
        """Mirror a row under flat names."""
        self._run.log(flat(row), step=int(row["step"]))

    def close(self) -> None:
        """Finish the run's files."""
        self._run.finish()


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Names with a slash for what is inside groups and lists; histograms as W&B's own, added up over their rows.

    >>> flat({"ev": 0.5, "l0": [1.0, 2.0], "coefficients": {"kl": 0.1}})
    {'ev': 0.5, 'l0/0': 1.0, 'l0/1': 2.0, 'coefficients/kl': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and "counts" in value:
            found[name] = _histogram(value)
        elif isinstance(value, Mapping | list):
            parts = value if isinstance(value, Mapping) else {str(index): part for index, part in enumerate(value)}
            found |= {f"{name}/{key}": part for key, part in flat(parts).items()}
        else:
            found[name] = value
    return found


def _histogram(value: Mapping[str, Any]) -> wandb.Histogram:
    edges = value["log10_edges"] if "log10_edges" in value else value["edges"]
    return wandb.Histogram(np_histogram=(np.array(value["counts"]).sum(axis=0), np.array(edges)))
