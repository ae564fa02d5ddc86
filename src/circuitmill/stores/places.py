"""Where the folders of stages and units lie in a run, found from their names alone.

results/<run>/<stage>                     a stage that all variants share
results/<run>/<variant>/<stage>           the others; variants that agree in a shared stage use the first one's
.../<stage>/<shard, block or prompt>/<u>  a unit
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from circuitmill.pipeline import STAGES
from circuitmill.pipeline import stage as stage_row
from circuitmill.stores.ledger import Ledger
from circuitmill.stores.manifest import NAME

_STAGES = {stage.name: stage for stage in STAGES}
_WORDS = tuple(dict.fromkeys(stage.unit for stage in STAGES if stage.unit))
_BESIDE = {"config", "logs", "benchmarks"}
"""Folders beside those of the stages, laid out alike, without results."""


@dataclass(frozen=True)
class Place:
    """Whose folder this is by its name."""

    stage: str
    unit: str | None
    home: Path
    """Folder of the run or of the variant, absolute."""

    @property
    def run(self) -> Path | None:
        """Folder of the run, absolute; None outside a folder `results`."""
        return next((path for path in (self.home, self.home.parent) if path.parent.name == "results"), None)

    def upstream(self, name: str) -> list[Path]:
        """The folders of a stage of which this one read one: its own, the run's, or those of all variants."""
        if name not in _STAGES:
            # the base of a training: it may lie in another run, which its manifest does not name
            return []
        own = [self.home / name]
        if stage_row(name).shared and self.home != self.run:
            own.append(self.home.parent / name)
        present = [folder for folder in own if (folder / NAME).exists()][:1]
        if present or not stage_row(name).shared or self.run is None:
            return present
        return sorted(path.parent for path in self.run.glob(f"*/{name}/{NAME}"))

    def rank(self) -> tuple:
        """Sorts in the order of the pipeline, units before what is gathered from them."""
        return (list(_STAGES).index(self.stage), str(self.home), self.unit is None, self.unit or "")


def place_of(folder: Path) -> Place | None:
    """Whose folder this is by its name and the names above it; None for any other folder."""
    path = Path(os.path.abspath(folder))  # noqa: PTH100  # resolve() would lose the names of linked folders
    above = _STAGES.get(path.parent.parent.name)
    if above is not None and above.unit == path.parent.name:
        return Place(above.name, path.name, path.parent.parent.parent)
    # a run may have the name of a stage
    known = path.name in _STAGES and path.parent.name != "results"
    return Place(path.name, None, path.parent) if known else None


def folders(folder: Path) -> Iterator[Path]:
    """Folders of stages and units at or below a folder, finished or not.

    A folder with a manifest counts whatever its name is. What a stage wrote into its own is not searched.
    """
    yield from _folders(folder, set())


def _folders(folder: Path, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    if (folder / NAME).exists() or place_of(folder) is not None:
        yield folder
        units = [folder / word for word in _WORDS if (folder / word).is_dir()]
        children = [child for parent in units for child in parent.iterdir()]
    else:
        children = [child for child in folder.iterdir() if child.name[0] != "." and child.name not in _BESIDE]
    for child in sorted(children):
        if child.is_dir():
            yield from _folders(child, seen)


def rebuild_command(folder: Path) -> str:
    """The commands that make a folder again, and nothing else.

    The manifest goes, so that the workflow sees that the folder is not done, and a ledger that a crash left, so that
    the stage does not vouch for what is there. Asked for by its own name the folder is made alone; `all` would make
    what follows again in the same breath.
    """
    present = [name for name in (NAME, Ledger.FILE) if (folder / name).exists()]
    place = place_of(folder)
    run = place.run if place else None
    if run is None:
        remove = "rm " + shlex.join(str(folder / name) for name in present) + ", then " if present else ""
        return f"{remove}run its stage again with --out {folder}"
    checkout = run.parent.parent
    inside = Path(os.path.abspath(folder)).relative_to(checkout)  # noqa: PTH100
    enter = "" if checkout == Path.cwd() else f"cd {shlex.quote(str(checkout))} && "
    remove = "rm " + shlex.join(str(inside / name) for name in present) + " && " if present else ""
    return f"{enter}{remove}snakemake {shlex.quote(str(inside / NAME))} --config run={shlex.quote(run.name)}"
