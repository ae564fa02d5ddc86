"""Wheels of what is installed here, so that an image gets the same files without an index or a network.

They carry the bytecode too, which takes longest to make: `pip install --no-compile` then leaves it in place.
"""

import base64
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath

NOT_IN_WHEELS = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""What an installer writes itself."""


def make_wheels(names: Iterable[str], folder: Path) -> None:
    """Write one wheel per distribution, not compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        make_wheel(distribution(name), folder)


def make_wheel(installed: Distribution, folder: Path) -> Path:
    """Write the wheel that an installed distribution came from."""
    metadata = next(path.parent for path in installed.files or () if path.name == "WHEEL")
    lines = (installed.read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    parts = [sorted({tag.split("-")[i] for tag in tags}) for i in range(3)]
    stem = metadata.name.removesuffix(".dist-info")
    path = folder / f"{stem}-{'-'.join('.'.join(part) for part in parts)}.whl"
    record = []
    with zipfile.ZipFile(path, "w") as wheel:
        for source, inside in _files(installed, stem):
            data = _detached(source) if source.suffix == ".pyc" else source.read_bytes()
            # a script keeps its permission to be run
            entry = zipfile.ZipInfo(inside)
            entry.external_attr = (source.stat().st_mode & 0xFFFF) << 16
            wheel.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f'"{inside}",sha256={digest},{len(data)}\n')
        name = f"{metadata}/RECORD"
        wheel.writestr(name, "".join(record) + f"{name},,\n")
    return path


def _files(installed: Distribution, stem: str) -> Iterable[tuple[Path, str]]:
    """Where each file lies, and its name in the wheel."""
    commands = {entry.name for entry in installed.entry_points if entry.group.endswith("_scripts")}
    for file in installed.files or ():
        path = PurePosixPath(file)
        if path.parent.name.endswith(".dist-info") and path.name in NOT_IN_WHEELS:
            continue
        if path.parts[0] != "..":
            inside = str(path)
        elif path.parent.name == "bin":
            if path.name in commands:  # the installer makes these
                continue
            inside = f"{stem}.data/scripts/{path.name}"
        else:
            # lib/python3.11/site-packages/../../../share/... is share/...
            inside = f"{stem}.data/data/{'/'.join(part for part in path.parts if part != '..')}"
        source = Path(str(installed.locate_file(file)))
        if path.suffix != ".pyc" or (path.parts[0] != ".." and source.exists()):
            yield source, inside


def _detached(bytecode: Path) -> bytes:
    """Bytecode that names its source by hash, not by time, and is taken without a look at it (PEP 552)."""
    data = bytecode.read_bytes()
    source = Path(importlib.util.source_from_cache(str(bytecode))).read_bytes()
    return data[:4] + (1).to_bytes(4, "little") + importlib.util.source_hash(source) + data[16:]
