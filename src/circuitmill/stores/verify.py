"""`circuitmill verify`: every manifest and every byte below a folder, and all that is wrong with them at once.

Of a manifest: it can be read, is of this format version, lies where what it describes belongs, matches its own digest,
is of the stage's current revision; its files have their sizes and checksums; it was made from its upstreams, and
gathered from its units, as they are now. A problem comes with the commands that rebuild the damaged folder alone.

A shard's `activations.zarr` needs no reader of its own: Zarr takes a missing chunk for zeros, but the manifest lists
every file.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from circuitmill.config.decode import decode
from circuitmill.config.run import config_class
from circuitmill.errors import CircuitmillError, ConfigError, StoreError, UpstreamError
from circuitmill.logs import progress
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.files import sha256_file
from circuitmill.stores.findings import Checked, Finding, Report
from circuitmill.stores.manifest import NAME, TIMING, Manifest, current_revision, read_manifest, read_timing
from circuitmill.stores.places import folders, place_of, rebuild_command

THREADS = 8
"""Files read at a time, at most; hashing runs beside other Python code."""


def verify(path: Path) -> Report:
    """Check everything at or below a path.

    Args:
        path: A run's folder, a stage's, a unit's, or one manifest.json.

    Raises:
        StoreError: there is no such path, or no manifest at or below it.
    """
    path = Path(path)
    if path.is_file() and path.name == NAME:
        chosen = [path.parent]
    elif path.is_dir():
        chosen = list(folders(path))
    else:
        found = "another file" if path.exists() else "no such path"
        raise StoreError("a run's folder, a stage's, or a manifest.json", found=found, where=path, fix="name one")
    finished = [folder for folder in chosen if (folder / NAME).exists()]
    if not finished:
        raise StoreError(
            "at least one manifest.json", found="none", where=path, fix="name a run's folder, such as results/demo"
        )
    tree = _Tree()
    for folder in finished:
        tree.read(folder)
    orphans = {folder: finding for folder in chosen if (finding := _orphan(tree, folder))}
    checked = [_check(tree, folder) for folder in sorted(finished, key=_rank) if folder not in orphans]
    named = {finding.path for one in checked for finding in one.findings}
    unfinished = [
        _unfinished(folder)
        for folder in chosen
        if folder not in finished and folder not in orphans and folder / NAME not in named and _own_files(folder)
    ]
    return Report(tuple(_read_files(tree, checked)), (*orphans.values(), *unfinished))


def _rank(folder: Path) -> tuple:
    place = place_of(folder)
    return (1, str(folder)) if place is None else (0, *place.rank())


class _Tree:
    """Manifests by folder, each read once. One that cannot be believed tells nothing about others."""

    def __init__(self) -> None:
        self._read: dict[str, Manifest | Finding | None] = {}
        self._digests: dict[str, str] = {}
        self._units: dict[str, tuple[str, ...] | None] = {}

    def read(self, folder: Path) -> Manifest | Finding | None:
        """The manifest of a folder, or what makes it useless; None if there is none."""
        key = os.path.abspath(folder)  # noqa: PTH100
        if key not in self._read:
            self._read[key] = self._open(folder) if (folder / NAME).exists() else None
        return self._read[key]

    def manifest(self, folder: Path) -> Manifest | None:
        """The same if it can be believed."""
        found = self.read(folder)
        return found if isinstance(found, Manifest) else None

    def digest(self, folder: Path) -> str | None:
        """The digest of a manifest that can be believed, None if there is no such."""
        manifest, key = self.manifest(folder), os.path.abspath(folder)  # noqa: PTH100
        if manifest is not None and key not in self._digests:
            self._digests[key] = manifest.digest
        return self._digests.get(key)

    def units(self, gather: Manifest) -> tuple[str, ...] | None:
        """The units of a stage by its configuration; None if this version does not read that."""
        key = str(gather.folder)
        if key not in self._units:
            try:
                self._units[key] = decode(config_class(gather.stage), gather.config, gather.stage).units()
            except ConfigError:
                self._units[key] = None
        return self._units[key]

    @staticmethod
    def _open(folder: Path) -> Manifest | Finding:
        path, place = folder / NAME, place_of(folder)
        try:
            manifest, recorded = read_manifest(path, place.stage if place else "that wrote it")
            current_revision(manifest)
        except UpstreamError as error:
            return _finding(path, error, rebuild_command(folder))
        if place is not None and (manifest.stage, manifest.unit) != (place.stage, place.unit):
            expected, found = _words(place.stage, place.unit), _words(manifest.stage, manifest.unit)
            return Finding(path, expected, found, rebuild_command(folder))
        if manifest.digest != recorded:
            return Finding(
                path,
                f"digest {manifest.digest}, that of its content",
                f"an edited one: {recorded}",
                rebuild_command(folder),
            )
        return manifest


def _words(stage: str, unit: str | None) -> str:
    return f"the manifest of stage {stage}" + (f", {stage_row(stage).unit} {unit}" if unit else "")


def _finding(path: Path, error: CircuitmillError, fix: str) -> Finding:
    return Finding(path, error.expected, str(error.found), fix)


def _orphan(tree: _Tree, folder: Path) -> Finding | None:
    """A unit that its stage's configuration does not name (any more): nothing reads it."""
    place = place_of(folder)
    gather = tree.manifest(folder.parent.parent) if place and place.unit else None
    names = tree.units(gather) if gather else None
    if place is None or place.unit is None or names is None or place.unit in names:
        return None
    return Finding(
        folder,
        f"a {folder.parent.name} that the configuration of stage {place.stage} names",
        f"{place.unit}, of another configuration",
        "nothing reads it; delete the folder if you do not need it",
        warning=True,
    )


def _check(tree: _Tree, folder: Path) -> Checked:
    """Everything but the bytes of the files."""
    path, manifest = folder / NAME, tree.read(folder)
    if not isinstance(manifest, Manifest):
        return Checked(path, findings=(manifest,) if manifest else ())
    findings = [*_stale(tree, folder, manifest), *_unit_findings(tree, folder, manifest)]
    wanted = current_revision(manifest)
    if manifest.revision != wanted:
        found = f"revision {manifest.revision}, whose results are not today's"
        findings.insert(
            0, Finding(path, f"revision {wanted} of stage {manifest.stage}", found, rebuild_command(folder))
        )
    try:
        read_timing(folder)
    except UpstreamError as error:
        findings.append(_finding(folder / TIMING, error, error.fix))
    return Checked(path, findings=(*findings, *_leftovers(folder, manifest)))


def _stale(tree: _Tree, folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Made from an upstream that has changed since."""
    place = place_of(folder)
    expected, found = [], []
    for name, digest in manifest.inputs.items() if place else ():
        present = [now for folder in place.upstream(name) if (now := tree.digest(folder))] if place else []
        if present and digest not in present:
            expected.append(f"{name} as it is now ({' or '.join(now[:12] for now in present)})")
            found.append(f"{name} as it was ({digest[:12]})")
    if found:
        yield Finding(
            folder / NAME,
            "one made from " + " and ".join(expected),
            "a stale one, made from " + " and ".join(found),
            rebuild_command(folder),
        )


def _unit_findings(tree: _Tree, folder: Path, gather: Manifest) -> Iterator[Finding]:
    """Units that are missing, of another configuration, or have changed since they were gathered."""
    word = stage_row(gather.stage).unit
    if word is None or gather.unit is not None:
        return
    names = tree.units(gather)
    if names is None:
        yield Finding(
            folder / NAME,
            "a configuration of this version",
            f"one of another, so that a missing {word} cannot be noticed",
            f"run stage {gather.stage} again if this is not wanted",
            warning=True,
        )
    recorded = _gathered(folder / f"{word}s.json", gather)
    changed = []
    for name in names if names is not None else recorded:
        home = folder / word / name
        unit = tree.read(home)
        if unit is None:
            expected = f"the manifest of {word} {name}, from which {gather.stage} was gathered"
            yield Finding(home / NAME, expected, "no such file", rebuild_command(home))
        elif isinstance(unit, Manifest) and unit.config != gather.config:
            expected = f"the configuration with which stage {gather.stage} was gathered"
            yield Finding(home / NAME, expected, "another configuration", rebuild_command(home))
        elif name in recorded and tree.digest(home) not in (None, recorded[name]):
            changed.append(name)
    if changed:
        yield Finding(
            folder / NAME,
            f"one gathered from {word} {', '.join(changed)} as it is now",
            f"a stale one: {word}s.json has other digests",
            rebuild_command(folder),
        )


def _gathered(path: Path, gather: Manifest) -> dict[str, str]:
    """Unit -> digest that a stage noted when it gathered; empty if it keeps no such list or the list is damaged."""
    entry = gather.files.get(path.name)
    # a damaged list is named as a file; what it says is worth nothing
    if entry is None or not path.is_file() or sha256_file(path) != entry["sha256"]:
        return {}
    units = json.loads(path.read_text())
    return {unit["name"]: unit["digest"] for unit in units}


def _leftovers(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Files that no manifest lists; a folder that holds nothing else is named as a whole."""
    above = {"."}
    for name in (*manifest.files, *manifest.volatile):
        while (name := os.path.dirname(name)) not in above and name:  # noqa: PTH120  # many files: text is faster
            above.add(name)
    skip = {NAME, TIMING, *manifest.files, *manifest.volatile}
    if manifest.unit is None:
        skip.add(stage_row(manifest.stage).unit or "")
    pending = [folder]
    while pending:
        for child in sorted(pending.pop().iterdir()):
            name = child.relative_to(folder).as_posix()
            if name in above:
                pending.append(child)
            elif name not in skip:
                yield from _leftover(child)


def _leftover(path: Path) -> Iterator[Finding]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    if files:
        size = sum(file.stat().st_size for file in files)
        found = f"{len(files)} files, {size:,} bytes" if path.is_dir() else f"a file of {size:,} bytes"
        fix = "nothing reads it; delete it if you do not need it"
        yield Finding(path, "only what a manifest lists", f"{found} that none lists", fix, warning=True)


def _own_files(folder: Path) -> bool:
    """Whether a folder holds anything but its units."""
    place = place_of(folder)
    word = stage_row(place.stage).unit if place and place.unit is None else None
    return any(child.name != word for child in folder.iterdir())


def _unfinished(folder: Path) -> Finding:
    return Finding(
        folder,
        "a manifest.json, with which a stage ends",
        "files without one: work that goes on or was interrupted",
        rebuild_command(folder),
        warning=True,
    )


def _read_files(tree: _Tree, checked: list[Checked]) -> Iterator[Checked]:
    """Add what is wrong with the files that each manifest lists."""
    jobs = [
        (index, one.path.parent, name, entry)
        for index, one in enumerate(checked)
        if (manifest := tree.manifest(one.path.parent))
        for name, entry in manifest.files.items()
    ]
    files, sizes = [0] * len(checked), [0] * len(checked)
    findings: list[list[Finding]] = [[] for _ in checked]
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        with progress("verifying", total=sum(job[3]["bytes"] for job in jobs) / 1e6, unit="MB") as bar:
            for (index, _, _, entry), (size, finding) in zip(jobs, pool.map(_look, jobs), strict=True):
                files[index] += 1
                sizes[index] += size
                findings[index] += [finding] if finding else []
                bar.advance(entry["bytes"] / 1e6)
    finally:
        pool.shutdown(cancel_futures=True)
    for one, n_files, n_bytes, found in zip(checked, files, sizes, findings, strict=True):
        yield replace(one, files=n_files, bytes=n_bytes, findings=(*one.findings, *found))


def _look(job: tuple[int, Path, str, dict]) -> tuple[int, Finding | None]:
    """Read a file; returns how many bytes that took and what is wrong."""
    _, folder, name, entry = job
    path = folder / name
    try:
        if not path.is_file():
            return 0, Finding(path, f"{entry['bytes']} bytes", "no such file", rebuild_command(folder))
        size = path.stat().st_size
        if size != entry["bytes"]:
            return 0, Finding(path, f"{entry['bytes']} bytes", f"{size} bytes", rebuild_command(folder))
        digest = sha256_file(path)
    except OSError as error:
        return 0, Finding(path, "a file that can be read", f"{error.strerror}", rebuild_command(folder))
    if digest != entry["sha256"]:
        return size, Finding(path, f"sha256 {entry['sha256']}", f"sha256 {digest}", rebuild_command(folder))
    return size, None
