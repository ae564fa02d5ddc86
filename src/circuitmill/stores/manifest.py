"""The manifest: done-mark, provenance record and table of contents of what a stage wrote.

`manifest.json` is written last and atomically; it is the output that the workflow knows. It carries

| key | meaning |
|---|---|
| format_version | of this file |
| stage, unit, revision | what wrote it |
| config | the stage's whole configuration |
| inputs | upstream stage -> digest of its manifest |
| sources | digests of outside data (corpus files), by name |
| counts | shapes, counts and headline figures |
| files | path below the folder -> bytes, sha256 |
| digest | SHA-256 of the canonical JSON of all of the above |
| volatile | paths of files whose content differs from one making to the next, if any; not part of the digest |
| code_version | of the package that wrote it; not part of the digest |

Time, memory and the device that it took differ from one run of the same work to the next, so they stand in
`timing.json` beside it, and what is made of them in files that are named but not described: a folder that is made again
from the same things gets the same manifest, byte for byte, and nothing that reads it reruns.
"""

import dataclasses
import json
import logging
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuitmill import __version__
from circuitmill.errors import StoreError, UpstreamError
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.files import atomic_write, digest_of, sha256_file
from circuitmill.stores.ledger import Ledger
from circuitmill.stores.timing import TIMING, computed_on, cpu_seconds, no_constant, read_timing

FORMAT_VERSION = 1
NAME = "manifest.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """The record of one finished stage or unit."""

    stage: str
    unit: str | None
    revision: int
    config: dict
    inputs: dict[str, str]
    counts: dict
    files: dict[str, dict]
    folder: Path
    sources: dict[str, str] = field(default_factory=dict)
    volatile: tuple[str, ...] = ()
    """Paths below the folder of files that tell of time, memory or the machine; they may be missing."""
    code_version: str = __version__
    format_version: int = FORMAT_VERSION
    wall_seconds: float = 0.0
    """From timing.json, as the next; 0 without that file."""
    peak_memory_bytes: int = 0
    cpu_seconds: float = 0.0
    """Of the process that wrote it and those that it has waited for; 0 if it was not noted."""
    device: str = ""
    """Name of the GPU that was computed on, or cpu; empty if it was not noted."""
    ranks: int = 1
    """Processes that worked on it together."""
    continued: bool = False
    """Whether an earlier run had begun it, whose time is not in `wall_seconds`."""

    _IDENTITY = ("format_version", "stage", "unit", "revision", "config", "inputs", "sources", "counts", "files")
    _HISTORY = ("code_version",)
    _TIMING = ("wall_seconds", "peak_memory_bytes", "cpu_seconds", "device", "ranks", "continued")

    @property
    def digest(self) -> str:
        """Changes whenever anything that later stages read changes."""
        return digest_of({key: getattr(self, key) for key in self._IDENTITY})

    def file(self, relative: str) -> Path:
        """Path of a data file.

        Raises:
            StoreError: the manifest lists no such file.
        """
        if relative not in self.files and relative not in self.volatile:
            raise StoreError(
                f"a file {relative} of stage {self.stage}",
                found=", ".join(sorted(self.files)[:8]) or "no files",
                where=self.folder / NAME,
                fix=f"rerun stage {self.stage}",
            )
        return self.folder / relative

    def checked_file(self, relative: str) -> Path:
        """Path of a small data file whose bytes have just been compared with their checksum.

        Raises:
            StoreError: the manifest lists no such file, or it is missing or damaged.
        """
        path = self.file(relative)
        found = sha256_file(path) if path.is_file() else "no such file"
        if found != self.files[relative]["sha256"]:
            unit = f" of {self.unit}" if self.unit else ""
            raise StoreError(
                f"sha256 {self.files[relative]['sha256']}",
                found=found,
                where=path,
                fix=f"delete {self.folder / NAME} and run stage {self.stage}{unit} again",
            )
        return path

    def to_json(self) -> str:
        """The text of manifest.json."""
        body: dict[str, Any] = {key: getattr(self, key) for key in self._IDENTITY + self._HISTORY}
        if self.volatile:
            body["volatile"] = self.volatile
        return json.dumps({**body, "digest": self.digest}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def timing_json(self) -> str:
        """The text of timing.json."""
        return json.dumps({key: getattr(self, key) for key in self._TIMING}) + "\n"

    def verify(self) -> None:
        """Read every data file and compare its checksum.

        Raises:
            StoreError: a file is missing or its bytes changed.
        """
        for relative, entry in self.files.items():
            path = self.folder / relative
            found = sha256_file(path) if path.is_file() else "no file"
            if found != entry["sha256"]:
                raise StoreError(
                    f"sha256 {entry['sha256']}",
                    found=found,
                    where=path,
                    fix=f"delete {self.folder / NAME} and rerun stage {self.stage}",
                )


def _refuse(expected: str, found: object, path: Path, stage: str) -> UpstreamError:
    return UpstreamError(
        expected, found=found, where=path, fix=f"run stage {stage} again (snakemake {stage}), then this stage"
    )


def read_manifest(path: Path, name: str = "that wrote it") -> tuple[Manifest, str | None]:
    """Read a manifest as it stands; whether it is the expected one, unedited and true is for the caller to check.

    Args:
        name: The stage to name in an error.

    Returns:
        The manifest without what timing.json says, and the digest written in it.

    Raises:
        UpstreamError: missing, unreadable or of another format version.
    """
    if not path.is_file():
        raise _refuse(f"the manifest of stage {name}", "no such file", path, name)
    try:
        raw = json.loads(path.read_text(), parse_constant=no_constant)
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise _refuse(f"manifest format version {FORMAT_VERSION}", f"version {version}", path, name)
        known = {key: raw[key] for key in Manifest._IDENTITY + Manifest._HISTORY}
        # earlier versions wrote the times into the manifest itself
        times = {key: raw[key] for key in Manifest._TIMING if key in raw}
        volatile = tuple(raw.get("volatile", ()))
        manifest = Manifest(folder=path.parent, volatile=volatile, **known, **times)
        if not all({"bytes", "sha256"} <= entry.keys() for entry in manifest.files.values()):
            raise KeyError("bytes and sha256 of a file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse("a complete manifest", f"{type(error).__name__}: {error}", path, name) from error
    return manifest, raw.get("digest")


def load_manifest(path: Path, stage: str | None = None, unit: str | None = None) -> Manifest:
    """Read a manifest and check that what it describes is there.

    Sizes of all files are compared; contents are checked where they are read (every format carries checksums), by
    `Manifest.verify`, and for a whole run by `circuitmill verify` (stores/verify.py).

    Args:
        stage: The stage that must have written it; None takes any.
        unit: The unit it must belong to.

    Raises:
        UpstreamError: missing, unreadable, of another format version, stage, unit or revision, edited, or a file it
            lists is missing or of another size.
    """
    path = Path(path)
    name = stage or "that wrote it"
    manifest, recorded = read_manifest(path, name)
    if stage is not None and (manifest.stage, manifest.unit) != (stage, unit):
        found = f"stage {manifest.stage}" + (f", unit {manifest.unit}" if manifest.unit else "")
        raise _refuse(f"the manifest of stage {stage}" + (f", unit {unit}" if unit else ""), found, path, name)
    wanted = current_revision(manifest)
    if manifest.revision != wanted:
        raise _refuse(
            f"revision {wanted} of stage {manifest.stage}", f"revision {manifest.revision}", path, manifest.stage
        )
    if manifest.digest != recorded:
        raise _refuse("a manifest that matches its own digest", "an edited one", path, manifest.stage)
    for relative, entry in manifest.files.items():
        file = manifest.folder / relative
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise _refuse(f"{entry['bytes']} bytes", found, file, manifest.stage)
    return dataclasses.replace(manifest, **read_timing(manifest.folder))


def current_revision(manifest: Manifest) -> int:
    """The revision that this version of the package gives the results of the manifest's stage.

    Raises:
        UpstreamError: there is no such stage.
    """
    try:
        return stage_row(manifest.stage).revision
    except KeyError as error:
        raise _refuse(
            "a stage of this version", f"stage {manifest.stage}", manifest.folder / NAME, manifest.stage
        ) from error


def load_upstreams(**paths: Path | None) -> dict[str, Manifest]:
    """Load the manifests a stage reads, checking that they belong together.

    Args:
        paths: Manifest path by stage name; None for a stage that this run does not have.

    Raises:
        UpstreamError: as `load_manifest`; or two of them were made from different versions of a third.
    """
    manifests = {name: load_manifest(path, name) for name, path in paths.items() if path is not None}
    for name, manifest in manifests.items():
        for source, digest in manifest.inputs.items():
            if source in manifests and manifests[source].digest != digest:
                raise _refuse(
                    f"stage {name} made from the given {source} ({manifests[source].digest[:12]})",
                    f"one made from {digest[:12]}",
                    manifest.folder / NAME,
                    name,
                )
    return manifests


def plain(cfg: object) -> dict:
    """A frozen configuration as plain JSON data (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))  # type: ignore[call-overload]


def identity(cfg: object) -> dict:
    """As `plain`, without options (metadata `identity: False`) that say with what a result is computed, not which."""
    kept = [each.name for each in dataclasses.fields(cfg) if each.metadata.get("identity", True)]  # type: ignore[arg-type]
    return {name: value for name, value in plain(cfg).items() if name in kept}


class StageOutput:
    """The folder a stage writes: continues, or clears, what is there and ends with the manifest.

    Args:
        stage: Name of the stage.
        cfg: The stage's frozen configuration.
        inputs: Upstream manifests by stage name.
        out: The folder. It belongs to this output alone, except for the names in `keep`.
        unit: Name of the unit, for one part of a stage that fans out.
        keep: Folders inside `out` with manifests of their own (the units of a gathering stage).
        volatile: Paths inside `out` of files that tell of time, memory or the machine: written like the others, but no
            digest depends on them.
        sources: Digests of data from outside the pipeline, by name.
    """

    def __init__(
        self,
        stage: str,
        cfg: object,
        inputs: dict[str, Manifest],
        out: Path,
        *,
        unit: str | None = None,
        keep: tuple[str, ...] = (),
        volatile: tuple[str, ...] = (),
        sources: dict[str, str] | None = None,
    ) -> None:
        self._start, self._cpu = time.monotonic(), cpu_seconds()
        self.folder, self._keep, self._volatile = Path(out), keep, volatile
        self._body = {
            "stage": stage,
            "unit": unit,
            "revision": stage_row(stage).revision,
            "config": identity(cfg),
            "inputs": {name: manifest.digest for name, manifest in inputs.items()},
            "sources": sources or {},
        }
        work = digest_of(self._body)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / NAME).unlink(missing_ok=True)
        leftovers = [child for child in self.folder.iterdir() if child.name not in keep]
        if leftovers and Ledger.identity_in(self.folder) != work:
            _log.info("%s: clearing what another configuration or input left in %s", stage, self.folder)
            for child in leftovers:
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        for temporary in self._data_files():
            if temporary.name.startswith(".") and temporary.suffix == ".tmp":
                temporary.unlink()
        self.ledger = Ledger(self.folder, work)

    def path(self, *parts: str) -> Path:
        """A path inside the folder; the folders above it are made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _data_files(self) -> Iterable[Path]:
        skip = {NAME, TIMING, Ledger.FILE, *self._keep}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.relative_to(self.folder).parts[0] not in skip:
                yield path

    def finish(self, counts: dict) -> Manifest:
        """Checksum every file, note what it took and write the manifest: the stage's last act.

        The ledger goes: doing finished work again means doing it anew, not vouching for whatever lies there by then.

        Args:
            counts: Shapes, counts and headline figures, as plain data without NaN.
        """
        found = {path.relative_to(self.folder).as_posix(): path for path in self._data_files()}
        files = {
            name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in found.items()
            if name not in self._volatile
        }
        manifest = Manifest(
            **self._body,
            counts=json.loads(json.dumps(counts, allow_nan=False)),
            files=files,
            volatile=self._volatile,
            folder=self.folder,
            wall_seconds=round(time.monotonic() - self._start, 3),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            cpu_seconds=round(cpu_seconds() - self._cpu, 3),
            continued=self.ledger.continued,
            **computed_on(),
        )
        atomic_write(self.folder / TIMING, manifest.timing_json())
        atomic_write(self.folder / NAME, manifest.to_json())
        self.ledger.delete()
        return manifest
