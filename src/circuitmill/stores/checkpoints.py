"""Checkpoints: a folder of named tensors and a small JSON per saved step, of which the newest few stay.

    checkpoints/step-00001200/state.safetensors
    checkpoints/step-00001200/state.json      {"format": 1, "step": 1200, "bytes": ..., "sha256": ...}

A folder appears under its name only when its files are on disk, so a kill at any moment leaves whole
checkpoints.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from circuitmill.errors import StoreError
from circuitmill.stores.files import atomic_write, sha256_file, sync_folder
from circuitmill.stores.tensors import read_tensors, write_tensors

FORMAT = 1
TENSORS, INFO = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step."""

    step: int
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint durably, then remove all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary, final = self.folder / f".step-{step:08d}.partial", self._path(step)
        for stale in (*self.folder.glob(".*.partial"), final):
            if stale.exists():
                shutil.rmtree(stale)
        temporary.mkdir()
        write_tensors(temporary / TENSORS, tensors)
        info = {
            "format": FORMAT,
            "step": step,
            "bytes": (temporary / TENSORS).stat().st_size,
            "sha256": sha256_file(temporary / TENSORS),
        }
        atomic_write(temporary / INFO, json.dumps(info, indent=1) + "\n")
        temporary.rename(final)
        sync_folder(self.folder)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._path(old))

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none.

        Raises:
            StoreError: it is damaged. An older one is not taken instead, because that is the reader's
            decision.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self._path(steps[-1])
        fix = f"delete {folder} to continue from the checkpoint before it, or the whole folder to start again"
        try:
            info = json.loads((folder / INFO).read_text())
            wanted = (info["format"], info["bytes"], info["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError("a checkpoint's description", found=str(error), where=folder / INFO, fix=fix) from error
        path = folder / TENSORS
        found = (FORMAT, path.stat().st_size, sha256_file(path)) if path.is_file() else "no file"
        if found != wanted:
            raise StoreError(f"(format, bytes, sha256) = {wanted}", found=found, where=path, fix=fix)
        return Checkpoint(steps[-1], read_tensors(path))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
