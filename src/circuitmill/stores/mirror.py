"""The rows of metrics.jsonl once more, as a Weights & Biases run in a folder that can be uploaded later."""

import os
from pathlib import Path
from typing import Any

import wandb


class WandbMirror:
    """Mirrors rows to Weights & Biases: files below `folder`/wandb, no network unless WANDB_MODE is "online".

    A resumed training gives the same `identity`, so that uploading joins its parts into one run.
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
        """Mirror a row; a list becomes one series per layer."""
        flat = {}
        for key, value in row.items():
            if isinstance(value, list):
                flat |= {f"{key}/layer_{layer}": entry for layer, entry in enumerate(value)}
            else:
                flat[key] = value
        self._run.log(flat, step=int(row["step"]))

    def close(self) -> None:
        """Finish the run's files."""
        self._run.finish()
