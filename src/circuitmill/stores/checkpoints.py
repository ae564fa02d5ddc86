"""Checkpoints: a folder of named tensors per saved step, written by all ranks, of which the newest few stay.

    checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors     what rank 0 wrote
    checkpoints/step-00001200/shard-00002-model-00001-of-00001.safetensors     what rank 1 wrote
    checkpoints/step-00001200/state.json          its format, step, ranks, and the bytes and SHA-256 of every file
    checkpoints/l0-00012.50-step-00000900/        the same, made when L0 fell below 12.5; stays

A folder appears under its name only when its files are on disk, so a kill at any moment on any rank leaves whole
checkpoints. Any number of ranks reads what any other number wrote.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from circuitmill.errors import StoreError
from circuitmill.stores import sharded
from circuitmill.stores.files import atomic_write, sha256_file, sync_folder
from circuitmill.stores.sharded import Entry, Part, Piece
from circuitmill.stores.tensors import fsync_path

__all__ = ["FORMAT", "INFO", "Checkpoints", "Entry", "Part", "Saved"]

FORMAT = 2
INFO = "state.json"
_NAME = re.compile(r"(?:l0-(\d+\.\d\d)-)?step-(\d+)")
_UNWRITTEN, _UNREAD = "a checkpoint written by all ranks", "a checkpoint that all ranks can read"
_AGAIN = "remove the cause and run again: the checkpoints before are as they were"

T = TypeVar("T")
log = logging.getLogger(__name__)


class Saved:
    """A whole checkpoint.

    Attributes:
        step: Finished steps.
        folder: Where it is.
        entries: Whole shape and type of every tensor, by name.
    """

    def __init__(self, step: int, folder: Path, metadata: Metadata) -> None:
        self.step, self.folder, self._metadata = step, folder, metadata
        self.entries = {
            name: (tuple(saved.size), saved.properties.dtype)
            for name, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }

    def read(self, wanted: Mapping[str, Entry]) -> None:
        """Fill tensors in place, however they were spread when saved; this rank by itself.

        Args:
            wanted: Tensors of which all values are replaced.

        Raises:
            StoreError: a tensor is not there, has another whole shape or type, or a file cannot be read.
        """
        for name, entry in wanted.items():
            extent = sharded.extent_of(name, entry)
            found = self.entries.get(name)
            if found != (extent.shape, extent.dtype):
                raise StoreError(
                    f"{name} of (shape, dtype) = {(extent.shape, extent.dtype)}",
                    found=found or "no tensor of that name",
                    where=self.folder,
                    fix="continue with the options that the checkpoint was made with, or start in another folder",
                )
            if lacking := sharded.missing(self._metadata, name, extent):
                raise StoreError(
                    f"all elements of {name}", found=f"{lacking} in no file", where=self.folder, fix=_fix(self.folder)
                )
        try:
            sharded.read(self.folder, self._metadata, wanted)
        except CheckpointException as error:
            raise StoreError(
                "files of a checkpoint", found=_reasons(error), where=self.folder, fix=_fix(self.folder)
            ) from error

    def read_all(self) -> dict[str, Tensor]:
        """Whole tensors.

        Raises:
            StoreError: a file cannot be read.
        """
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.entries.items()}
        self.read(tensors)
        return tensors


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: The same on all ranks, on a file system that all of them see.
        keep: How many of the newest stay.
        rank: Of this process, among `size`.
        group: All `size` ranks, on the CPU (gloo), used by nothing else because a thread talks through it, with a
            timeout longer than it takes to write a checkpoint. None for one process.
    """

    def __init__(
        self, folder: Path, *, keep: int, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        asked, given = (rank, size), (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        if asked != given:
            raise StoreError(
                f"a group in which (rank, size) = {asked}", found=given, where=folder, fix="give the group of all ranks"
            )
        self.folder, self._keep = folder, keep
        self._rank, self._size, self._group = rank, size, group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint which newer ones will replace, ascending."""
        return sorted(step for step, l0, _ in self._found() if l0 is None)

    def kept(self) -> dict[float, Path]:
        """Folders of the checkpoints that stay, by the value of L0 that they were made for, largest first."""
        return {
            l0: path for _, l0, path in sorted(self._found(), key=lambda found: found[2].name)[::-1] if l0 is not None
        }

    def save(self, step: int, state: Mapping[str, Entry], l0: float | None = None) -> None:
        """Copy the state and write it in the background, durably; all ranks call it.

        Waits for the write before it. On return the state may change again.

        Args:
            step: Finished steps.
            state: What this rank has. What several ranks have is written by one of them.
            l0: What L0 has fallen below: the checkpoint stays. Without it all but the newest `keep` are removed.

        Raises:
            StoreError: on all ranks: what ranks have does not make whole tensors, or the write before failed.
        """
        self.wait()
        final = self.folder / (f"step-{step:08d}" if l0 is None else f"l0-{l0:08.2f}-step-{step:08d}")
        said = self._agree(
            _UNWRITTEN, lambda: (final.name, {name: sharded.extent_of(name, entry) for name, entry in state.items()})
        )
        if len({name for name, _ in said}) > 1:
            raise StoreError(
                "the same step on all ranks",
                found=[name for name, _ in said],
                where=self.folder,
                fix="save after the same step everywhere",
            )
        mine = sharded.shares([extents for _, extents in said], final)[self._rank]
        staged, failure = {}, None
        try:
            staged = sharded.stage(state, mine)
        except (RuntimeError, MemoryError) as error:
            failure = error  # told to the others in the thread, where they wait for this rank
        self._writing = self._thread.submit(self._write, final, step, staged, failure)

    def wait(self) -> None:
        """Return when what was saved is on disk.

        Raises:
            StoreError: on all ranks, when one could not write. Nothing is left of that checkpoint.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def last(self) -> Saved | None:
        """The newest checkpoint, of both sorts, or None if there is none; all ranks call it.

        Raises:
            StoreError: on all ranks: it is damaged. An older one is not taken instead, because that is the
                reader's decision.
        """
        self.wait()
        found = self._agree(_UNREAD, lambda: self._newest() if self._rank == 0 else None)[0]
        if found is None:
            return None
        step, name, files = found
        folder = self.folder / name
        metadata: list[Metadata] = []
        self._agree(_UNREAD, lambda: metadata.append(self._verified(folder, files)))
        return Saved(step, folder, metadata[0])

    def close(self) -> None:
        """Wait for the write that is going on.

        Raises:
            StoreError: as in `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # what ended the training goes on to the caller

    # writing, in the thread

    def _write(self, final: Path, step: int, staged: dict[MetadataIndex, Piece], failure: Exception | None) -> None:
        temporary = self.folder / f".{final.name}.partial"
        try:
            self._agree(_UNWRITTEN, lambda: self._prepare(temporary, failure))
            files = self._agree(_UNWRITTEN, lambda: self._write_files(temporary, staged))
            self._agree(_UNWRITTEN, lambda: self._publish(temporary, final, step, files))
        except StoreError:
            if self._rank == 0:
                self._clear_up(temporary)
            raise

    def _clear_up(self, temporary: Path) -> None:
        try:
            self._recover()
            if temporary.exists():
                shutil.rmtree(temporary)
        except OSError as error:
            # why there is no checkpoint is raised; what is left does not have its name and goes before the next one
            log.error("%s stays: %s", temporary, error)

    def _prepare(self, temporary: Path, failure: Exception | None) -> None:
        if failure is not None:
            raise failure
        if self._rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            for stale in self.folder.glob(".*.partial"):
                shutil.rmtree(stale)
            temporary.mkdir()

    def _write_files(self, temporary: Path, staged: dict[MetadataIndex, Piece]) -> dict[str, dict[str, Any]]:
        sharded.write(temporary, staged, self._group)
        files = {}
        for path in sorted(temporary.glob(f"{sharded.file_prefix(self._rank)}*{sharded.SUFFIX}")):
            fsync_path(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        return files

    def _publish(self, temporary: Path, final: Path, step: int, files: list[dict[str, dict[str, Any]]]) -> None:
        if self._rank != 0:
            return
        written = {name: about for mine in files for name, about in mine.items()}
        for name, about in written.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != about["bytes"]:
                raise StoreError(
                    f"{about['bytes']} bytes, written by another rank",
                    found=f"{path.stat().st_size} bytes" if path.is_file() else "no file",
                    where=path,
                    fix="put the folder on a file system that all ranks share",
                )
        info = {"format": FORMAT, "step": step, "ranks": self._size, "files": written}
        atomic_write(temporary / INFO, json.dumps(info, indent=1) + "\n")
        replaced = self.folder / f".{final.name}.replaced"
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(self.folder)
        if replaced.exists():
            self._discard(replaced, final.name)
        for old in self.steps()[: -self._keep]:
            self._discard(self.folder / f"step-{old:08d}", f"step-{old:08d}")

    def _discard(self, folder: Path, name: str) -> None:
        """Remove a checkpoint that is not half removed under its name when a kill comes."""
        hidden = folder.rename(self.folder / f".{name}.partial")
        shutil.rmtree(hidden)

    def _recover(self) -> None:
        """Finish what a kill cut off between the two renames that replace a checkpoint of the same name."""
        for replaced in self.folder.glob(".*.replaced"):
            final = self.folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if final.exists():
                self._discard(replaced, final.name)
            else:
                replaced.rename(final)

    # reading

    def _newest(self) -> tuple[int, str, dict[str, tuple[int, str]]] | None:
        """Step, name of the folder, and bytes and SHA-256 of every file as its description has them."""
        self._recover()
        found = self._found()
        if not found:
            return None
        # of those of one step the name decides, so that it is always the same one
        step, _, folder = max(found, key=lambda entry: (entry[0], entry[2].name))
        try:
            info = json.loads((folder / INFO).read_text())
            said = (info["format"], info["step"])
            if said == (FORMAT, step):
                files = {name: (about["bytes"], about["sha256"]) for name, about in info["files"].items()}
                return step, folder.name, files
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                "a checkpoint's description", found=str(error), where=folder / INFO, fix=_fix(folder)
            ) from error
        raise StoreError(f"(format, step) = {(FORMAT, step)}", found=said, where=folder / INFO, fix=_fix(folder))

    def _verified(self, folder: Path, files: dict[str, tuple[int, str]]) -> Metadata:
        """Check this rank's share of the files and see what all of them hold."""
        stray = {path.name for path in folder.glob(f"*{sharded.SUFFIX}")} - set(files)
        if stray:
            raise StoreError(f"files {sorted(files)}", found=f"also {sorted(stray)}", where=folder, fix=_fix(folder))
        for name in sorted(files)[self._rank :: self._size]:
            path = folder / name
            found = (path.stat().st_size, sha256_file(path)) if path.is_file() else "no file"
            if found != files[name]:
                raise StoreError(f"(bytes, sha256) = {files[name]}", found=found, where=path, fix=_fix(folder))
        try:
            return sharded.read_metadata(folder)
        except SafetensorError as error:
            raise StoreError("safetensors files", found=str(error), where=folder, fix=_fix(folder)) from error

    def _found(self) -> list[tuple[int, float | None, Path]]:
        """Step, value of L0 if it was made for one, and folder of all checkpoints."""
        if not self.folder.is_dir():
            return []
        matches = [(path, _NAME.fullmatch(path.name)) for path in self.folder.iterdir()]
        return [(int(match[2]), float(match[1]) if match[1] else None, path) for path, match in matches if match]

    # agreement

    def _agree(self, expected: str, work: Callable[[], T]) -> list[T]:
        """Do work on every rank and learn what came of it on all.

        Raises:
            StoreError: the same on all ranks, that of the first which failed.
        """
        result, failure, cause = None, None, None
        try:
            result = work()
        except StoreError as error:
            cause, failure = error, (error.expected, str(error.found), str(error.where), error.fix)
        except CheckpointException as error:
            cause, failure = error, (expected, _reasons(error), str(self.folder), _AGAIN)
        except Exception as error:  # noqa: BLE001  whatever it is: ranks that hear nothing wait for ever
            reason = f"rank {self._rank}: {type(error).__name__}: {error}"
            cause, failure = error, (expected, reason, str(self.folder), _AGAIN)
        outcomes = self._gather((result, failure))
        for _, failure in outcomes:
            if failure:
                expected, found, where, fix = failure
                raise StoreError(expected, found=found, where=where, fix=fix) from cause
        return [result for result, _ in outcomes]

    def _gather(self, mine: Any) -> list[Any]:
        if self._group is None:
            return [mine]
        everyone: list[Any] = [None] * self._size
        try:
            dist.all_gather_object(everyone, mine, group=self._group)
        except RuntimeError as error:
            raise StoreError(
                "all ranks at the checkpoint",
                found=f"rank {self._rank}: {error}",
                where=self.folder,
                fix="see in the log of which rank ended or hangs, and run again from the newest checkpoint",
            ) from error
        return everyone


def _fix(folder: Path) -> str:
    return f"delete {folder} to continue from the checkpoint before it, or the whole folder to start again"


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items()))
