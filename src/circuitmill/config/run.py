"""A whole run: which model, which stages, which variants."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM, STAGES

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_STAGE_FOLDERS = {stage.name for stage in STAGES} | {"config", "logs", "benchmarks"}


def config_class(stage: str) -> type:
    """The frozen dataclass of a stage: `TrainConfig` of `circuitmill.config.train`."""
    module = importlib.import_module(f"circuitmill.config.{stage}")
    return getattr(module, f"{stage.capitalize()}Config")


@dataclass(frozen=True)
class Run:
    """A decoded run. Shared stages have one configuration, the others one per variant."""

    name: str
    variants: tuple[str, ...]
    stages: dict[str, dict[str, Any]]
    """Stage name -> variant -> frozen configuration; shared stages under the variant name "" only."""
    plain: dict[str, dict[str, dict]]
    """The same as plain data, as it is frozen to YAML."""

    @property
    def has_toyworld(self) -> bool:
        """Whether the run makes its own corpus and language model."""
        return OPTIONAL_UPSTREAM in self.stages

    def stage_names(self) -> tuple[str, ...]:
        """The stages of this run, in pipeline order."""
        return tuple(stage.name for stage in STAGES if stage.name in self.stages)

    def config(self, stage: str, variant: str = "") -> Any:
        """The frozen configuration of a stage."""
        return self.stages[stage][variant]


def variant_names(variants: dict) -> tuple[str, ...]:
    """Names of a run's variants; a run that lists none has the one variant `main`.

    Raises:
        ConfigError: a name is not usable as a folder beside the stages.
    """
    names = tuple(variants) or ("main",)
    for name in names:
        if not _VARIANT.match(str(name)) or name in _STAGE_FOLDERS:
            raise ConfigError(
                "a variant name of letters, digits, '.', '_' and '-' that is not a stage",
                found=repr(name),
                where="variants",
                fix="rename the variant",
            )
    return names


def decode_run(composed: dict[str, dict]) -> Run:
    """Decode the composed tree of every variant.

    Args:
        composed: Variant name -> plain composed tree (top-level keys: name, model, variants, one per stage).

    Raises:
        ConfigError: anything is wrong with any of them.
    """
    variants = tuple(composed)
    first = composed[variants[0]]
    known = {"name", "model", "variants"} | {stage.name for stage in STAGES}
    unknown = sorted(set(first) - known)
    if unknown:
        raise ConfigError(
            "top-level keys " + ", ".join(sorted(known)), found=", ".join(unknown), where="config", fix="remove them"
        )
    embedded = first["model"]["source"] == "toyworld"
    stages: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, dict]] = {}
    for row in STAGES:
        if row.name == OPTIONAL_UPSTREAM and not embedded:
            continue
        for variant in ("",) if row.shared else variants:
            data = composed[variant or variants[0]].get(row.name, {})
            plain.setdefault(row.name, {})[variant] = data
            stages.setdefault(row.name, {})[variant] = decode(config_class(row.name), data, row.name)
    return Run(first["name"], variants, stages, plain)
