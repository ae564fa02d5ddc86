"""The run as a whole: what every stage left, and where the page stands in the results folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from circuitmill.config.decode import decode
from circuitmill.config.run import config_class
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.manifest import NAME, Manifest, load_manifest


@dataclass(frozen=True)
class StageFacts:
    """One line of the table of stages: what is the same however often the stage is made."""

    name: str
    folders: int
    """Its own, and those of its units."""
    bytes: int
    """Of the data files in them."""
    digest: str
    config: dict


def unit_manifests(manifest: Manifest) -> list[Manifest]:
    """The manifests of the units that a stage's configuration names; none for a stage without units."""
    unit = stage_row(manifest.stage).unit
    if unit is None:
        return []
    names = decode(config_class(manifest.stage), manifest.config, manifest.stage).units()
    return [load_manifest(manifest.folder / unit / name / NAME, manifest.stage, unit=name) for name in names]


def all_manifests(manifests: Mapping[str, Manifest]) -> dict[str, list[Manifest]]:
    """The manifests of some stages, each with those of its units."""
    return {name: [manifest, *unit_manifests(manifest)] for name, manifest in manifests.items()}


def stage_facts(manifests: Mapping[str, list[Manifest]]) -> list[StageFacts]:
    """What each stage left.

    Args:
        manifests: By stage: its own, and those of its units.
    """
    return [
        StageFacts(
            name=name,
            folders=len(found),
            bytes=sum(entry["bytes"] for one in found for entry in one.files.values()),
            digest=found[0].digest,
            config=found[0].config,
        )
        for name, found in manifests.items()
    ]


def run_folder(manifest: Manifest) -> Path:
    """Folder of the run: a stage that every variant has for itself lies in `results/<run>/<variant>/<stage>`."""
    return manifest.folder.resolve().parents[1]


def run_name(manifest: Manifest) -> str:
    """Name of the run, of a stage that every variant has for itself."""
    return run_folder(manifest).name


def variant_name(manifest: Manifest) -> str:
    """Name of the variant, of a stage that every variant has for itself: `results/<run>/<variant>/<stage>`."""
    return manifest.folder.resolve().parent.name


def config_text(config: Mapping, indent: int = 0) -> str:
    """A configuration as indented `key: value` lines.

    >>> print(config_text({"lr": 0.1, "model": {"name": "toyworld"}}))
    lr: 0.1
    model:
      name: toyworld
    """
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{' ' * indent}{key}:", config_text(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {value}")
    return "\n".join(lines)
