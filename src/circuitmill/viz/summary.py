"""The last words of a run: where the page is, the headline figures, how long it took."""

from collections.abc import Sequence
from pathlib import Path

from circuitmill.stores.graphs import read_json
from circuitmill.stores.manifest import load_manifest
from circuitmill.viz import study_view
from circuitmill.viz.formatting import Real, duration

FILE = "summary.json"
STUDY = "study.json"
USAGE = "usage.json"
"""What the stages before took: not in the manifest's digest, and it may be missing."""


def summary_document(run: str, variant: str, tiles: Sequence[dict]) -> dict:
    """What `headline` prints, as data beside the page.

    Args:
        tiles: Headline figures: key, label, value, note.
    """
    return {"run": run, "variant": variant, "tiles": list(tiles)}


def headline(report_manifest_path: Path, elapsed_seconds: Real | None = None) -> str:
    """The closing text of a run.

    Args:
        elapsed_seconds: On the clock, if the caller measured it.

    Raises:
        UpstreamError: no finished report there.
    """
    manifest = load_manifest(report_manifest_path, "report")
    document = read_json(manifest.file(FILE))
    width = max(len(tile["label"]) for tile in document["tiles"])
    lines = [f"{document['run']} / {document['variant']}"]
    lines += [f"  {tile['label']:<{width}}  {tile['value']:>10}  {tile['note']}" for tile in document["tiles"]]
    usage = manifest.folder / USAGE
    before = read_json(usage)["wall_seconds"] if usage.is_file() else None
    work = "not noted" if before is None else duration(before + manifest.wall_seconds)
    lines.append(f"  {'Work time, all jobs':<{width}}  {work}")
    if elapsed_seconds is not None:
        lines.append(f"  {'Wall time':<{width}}  {duration(elapsed_seconds)}")
    lines.append(f"  {'Page':<{width}}  {manifest.file('index.html').resolve()}")
    return "\n".join(lines)


def study(report_manifest_path: Path) -> str | None:
    """The table that compares variants which differ in a shared stage; None if the run has no such variants.

    Raises:
        UpstreamError: no finished report there.
    """
    manifest = load_manifest(report_manifest_path, "report")
    return study_view.text(read_json(manifest.file(STUDY))) if STUDY in manifest.files else None
