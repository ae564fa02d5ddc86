"""The run as a whole: what every stage took, and where the page stands in the results folder."""

from collections.abc import Mapping
from dataclasses import dataclass

from circuitmill.config.decode import decode
from circuitmill.config.run import config_class
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.manifest import NAME, Manifest, load_manifest
from circuitmill.viz.formatting import Real


@dataclass(frozen=True)
class StageFacts:
    """One line of the table of stages."""

    name: str
    jobs: int
    """The gathering job and its units."""
    wall_seconds: Real
    """Of all jobs together."""
    peak_memory_bytes: int
    """Of the largest job."""
    bytes: int
    digest: str
    config: dict


def unit_manifests(manifest: Manifest) -> list[Manifest]:
    """The manifests of the units that a stage's configuration names; none for a stage without units."""
    unit = stage_row(manifest.stage).unit
    if unit is None:
        return []
    names = decode(config_class(manifest.stage), manifest.config, manifest.stage).units()
    return [load_manifest(manifest.folder / unit / name / NAME, manifest.stage, unit=name) for name in names]


def stage_facts(manifests: Mapping[str, Manifest]) -> list[StageFacts]:
    """What each stage took, in pipeline order."""
    facts = []
    for name, manifest in manifests.items():
        jobs = [manifest, *unit_manifests(manifest)]
        facts.append(
            StageFacts(
                name=name,
                jobs=len(jobs),
                wall_seconds=sum(job.wall_seconds for job in jobs),
                peak_memory_bytes=max(job.peak_memory_bytes for job in jobs),
                bytes=sum(entry["bytes"] for job in jobs for entry in job.files.values()),
                digest=manifest.digest,
                config=manifest.config,
            )
        )
    return facts


def run_name(manifest: Manifest) -> str:
    """Name of the run: a stage that every variant has for itself lies in `results/<run>/<variant>/<stage>`."""
    return manifest.folder.resolve().parents[1].name


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
