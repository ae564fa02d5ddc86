"""One safetensors file, written so that a reader never sees half of it and read so that damage has a name."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuitmill.errors import StoreError

READABLE = 0o644
"""Mode of the files: the library creates them for the owner alone, which breaks shared folders."""


def fsync_path(path: Path) -> None:
    """Ask the disk to hold a file's content, or a folder's list of names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write under a temporary name, flush, rename: after a crash the file is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.chmod(READABLE)
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


def sort_metadata(path: Path) -> None:
    """Put the notes in a file's header in the order of their names: the library leaves them in one of chance.

    Raises:
        StoreError: they need more room than they had.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:  # it writes them in another way than this does
            raise StoreError(
                f"a header of at most {size} bytes", found=len(text), where=path, fix="install the pinned safetensors"
            )
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(path: Path, expected: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        expected: Name and shape of every tensor that the file must hold, no more and no fewer.

    Raises:
        StoreError: the file is missing, damaged, or holds other tensors than expected.
    """
    if not path.is_file():
        raise StoreError(
            "expected a safetensors file", found="nothing", where=path, fix="rerun the stage that writes it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(
            "expected a whole safetensors file",
            found=str(error),
            where=path,
            fix="restore it or rerun the stage that writes it",
        ) from error
    if expected is not None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise StoreError(
                f"expected tensors {expected}",
                found=str(found),
                where=path,
                fix="remove files of another model or rerun the stage",
            )
    return tensors


def check_floating(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse integer and boolean tensors and values that are not finite.

    Raises:
        StoreError: a tensor cannot be a parameter.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise StoreError(
                f"expected {name} in a floating-point type",
                found=str(tensor.dtype),
                where=path,
                fix="rerun the stage that writes it",
            )
        if not torch.isfinite(tensor).all():
            raise StoreError(
                f"expected finite values in {name}",
                found="infinity or not-a-number",
                where=path,
                fix="rerun the stage that writes it",
            )
