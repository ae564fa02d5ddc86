"""The stages as data: what each reads, what it fans out over, and the revision of its results.

Everything that must agree about stages (command line, workflow, documentation, tests) derives it from `STAGES`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Also the name of its rule file, module, configuration group, folder, subcommand and workflow target."""
    upstream: tuple[str, ...]
    """Stages whose manifests it reads, in pipeline order."""
    unit: str | None = None
    """The wildcard it fans out over; None if it is one job."""
    shared: bool = False
    """Run once per run rather than once per variant."""
    revision: int = 1
    """Raise when the same configuration and inputs would give other results: the stage and what follows rerun."""


STAGES: tuple[Stage, ...] = (
    Stage("toyworld", (), shared=True, revision=3),
    Stage("tokenize", ("toyworld",), shared=True),
    Stage("calibrate", ("toyworld", "tokenize"), shared=True),
    Stage("cache", ("toyworld", "tokenize", "calibrate"), unit="shard", shared=True, revision=2),
    Stage("train", ("toyworld", "tokenize", "cache"), revision=5),
    Stage("evaluate", ("toyworld", "tokenize", "cache", "train"), revision=2),
    Stage("features", ("toyworld", "tokenize", "cache", "train"), unit="block"),
    Stage("interpret", ("features",), unit="block"),
    Stage("attribute", ("toyworld", "tokenize", "train", "features", "interpret"), unit="prompt", revision=2),
    Stage(
        "report",
        ("toyworld", "tokenize", "cache", "train", "evaluate", "features", "interpret", "attribute"),
        revision=2,
    ),
)

OPTIONAL_UPSTREAM = "toyworld"
"""Only runs on the embedded model have this stage; others leave the input out."""

_BY_NAME = {stage.name: stage for stage in STAGES}


def stage(name: str) -> Stage:
    """Look a stage up by name.

    Raises:
        KeyError: no stage has this name.
    """
    return _BY_NAME[name]
