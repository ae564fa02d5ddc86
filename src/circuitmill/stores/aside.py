"""Units that one job makes one after the other: what is finished survives the job.

The workflow deletes the declared outputs of a job that failed, so that the manifest of a unit which is finished while
others of its job are not lies under another name until all are.
"""

from collections.abc import Mapping
from pathlib import Path

from circuitmill.stores.files import sync_folder
from circuitmill.stores.manifest import NAME, Manifest, identity, load_manifest

ASIDE = "finished.json"


def set_aside(folder: Path) -> None:
    """Give the manifest of a finished unit its other name."""
    (folder / NAME).rename(folder / ASIDE)
    sync_folder(folder)


def put_back(folder: Path) -> None:
    """Give it its own name: the unit's last act."""
    (folder / ASIDE).rename(folder / NAME)
    sync_folder(folder)


def is_aside(folder: Path, stage: str, unit: str, cfg: object, inputs: Mapping[str, Manifest]) -> bool:
    """Whether a unit was finished from this configuration and these inputs.

    Raises:
        UpstreamError: its manifest is there but damaged, or what it lists is missing.
    """
    if not (folder / ASIDE).is_file():
        return False
    found = load_manifest(folder / ASIDE, stage, unit)
    same = found.inputs == {name: manifest.digest for name, manifest in inputs.items()}
    return same and found.config == identity(cfg)
