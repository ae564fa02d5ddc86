"""Checkpoints: a folder of named tensors and a small JSON per saved step, of which the newest few stay.

    checkpoints/step-00001200/state.safetensors
    checkpoints/step-00001200/state.json      {"format": 1, "step": 1200, "bytes": ..., "sha256": ...}
    checkpoints/l0-00012.50-step-00000900/    the same, made when L0 fell below 12.5; stays

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
_NAME = re.compile(r"(?:l0-(\d+\.\d\d)-)?step-(\d+)")


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
        """Steps that have a checkpoint which newer ones will replace, ascending."""
        return sorted(step for step, l0, _ in self._found() if l0 is None)

    def kept(self) -> dict[float, Path]:
        """Folders of the checkpoints that stay, by the value of L0 that they were made for, largest first."""
        return {
            l0: path for _, l0, path in sorted(self._found(), key=lambda found: found[2].name)[::-1] if l0 is not None
        }

    def save(self, step: int, tensors: dict[str, Tensor], l0: float | None = None) -> None:
        """Write a checkpoint durably.

        Args:
            step: Finished steps.
            tensors: All of the state.
            l0: What L0 has fallen below: the checkpoint stays. Without it all but the newest `keep` are removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / (f"step-{step:08d}" if l0 is None else f"l0-{l0:08.2f}-step-{step:08d}")
        temporary = self.folder / f".{final.name}.partial"
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
            shutil.rmtree(self.folder / f"step-{old:08d}")

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, of both sorts, or None if there is none.

        Raises:
            StoreError: it is damaged. An older one is not taken instead, because that is the reader's
            decision.
        """
        found = self._found()
        if not found:
            return None
        # of those of one step the name decides, so that it is always the same one
        step, _, folder = max(found, key=lambda entry: (entry[0], entry[2].name))
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
        return Checkpoint(step, read_tensors(path))

    def _found(self) -> list[tuple[int, float | None, Path]]:
        """Step, value of L0 if it was made for one, and folder of all checkpoints."""
        if not self.folder.is_dir():
            return []
        matches = [(path, _NAME.fullmatch(path.name)) for path in self.folder.iterdir()]
        return [(int(match[2]), float(match[1]) if match[1] else None, path) for path, match in matches if match]
