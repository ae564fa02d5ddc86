"""How much of a run is there: manifests on disk against those that its configuration asks for."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.config.compose import load_run, read_frozen
from circuitmill.config.decode import decode
from circuitmill.config.run import Run, config_class
from circuitmill.pipeline import STAGES, Stage

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StageProgress:
    """Manifests of one stage, of one variant if variants do not share it."""

    stage: str
    variant: str
    """Empty for a stage in the run's own folder."""
    there: bool
    """Whether the stage's own manifest exists."""
    unit: str | None
    """What it fans out over."""
    units_there: int
    units: int

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return dict(vars(self))


def of_run(folder: Path, run: Run) -> list[StageProgress]:
    """Progress of a composed run, in pipeline order.

    Args:
        folder: `results/<run>`.
    """
    return [
        _progress(folder, row, home, cfg)
        for row in STAGES
        if row.name in run.stages
        for home, cfg in run.stages[row.name].items()
    ]


def of_frozen(folder: Path) -> list[StageProgress]:
    """Progress of the stages whose configuration was frozen so far, in pipeline order.

    Args:
        folder: `results/<run>`.

    Raises:
        ConfigError: a frozen configuration cannot be read or decoded.
    """
    found = []
    for row in STAGES:
        for path in [folder / "config" / f"{row.name}.yaml", *sorted(folder.glob(f"*/config/{row.name}.yaml"))]:
            if path.is_file():
                home = path.parent.parent.name if path.parent.parent != folder else ""
                cfg = decode(config_class(row.name), read_frozen(path), row.name)
                found.append(_progress(folder, row, home, cfg))
    return found


def composed(checkout: Path, experiment: str, overrides: list[str]) -> Run:
    """The run as the workflow in a checkout composes it.

    Raises:
        ConfigError: it cannot be composed (any more).
    """
    # options are looked for below the working directory
    with contextlib.chdir(checkout):
        return load_run(experiment, overrides)


def _progress(folder: Path, row: Stage, home: str, cfg: Any) -> StageProgress:
    place = folder / home / row.name
    names = cfg.units() if row.unit else ()
    there = sum((place / str(row.unit) / name / _MANIFEST).is_file() for name in names)
    return StageProgress(row.name, home, (place / _MANIFEST).is_file(), row.unit, there, len(names))
