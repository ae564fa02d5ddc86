"""A whole run: which model, which stages, which variants, and which variants share the output of a stage."""

import dataclasses
import importlib
import re
from dataclasses import dataclass
from typing import Any

from circuitmill.config.decode import decode
from circuitmill.config.together import check_together, qualified
from circuitmill.errors import ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM, STAGES, Stage
from circuitmill.pipeline import stage as stage_row

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_STAGE_FOLDERS = {stage.name for stage in STAGES} | {"config", "logs", "benchmarks"}


def config_class(stage: str) -> type:
    """The frozen dataclass of a stage: `TrainConfig` of `circuitmill.config.train`."""
    module = importlib.import_module(f"circuitmill.config.{stage}")
    return getattr(module, f"{stage.capitalize()}Config")


@dataclass(frozen=True)
class Run:
    """A decoded run.

    Every stage has a home per variant: the variant in whose folder the output lies that this variant uses. That is the
    variant itself for train and what follows. Variants share a shared stage if they agree in its configuration and in
    those of all shared stages before it; its home is the first of them, or "" (the run's own folder) if all agree.
    """

    name: str
    variants: tuple[str, ...]
    homes: dict[str, dict[str, str]]
    """Stage name -> variant -> home."""
    stages: dict[str, dict[str, Any]]
    """Stage name -> home -> frozen configuration."""
    plain: dict[str, dict[str, dict]]
    """The same as plain data, as it is frozen to YAML."""

    @property
    def has_toyworld(self) -> bool:
        """Whether the run makes its own corpus and language model."""
        return OPTIONAL_UPSTREAM in self.stages

    def stage_names(self) -> tuple[str, ...]:
        """The stages of this run, in pipeline order."""
        return tuple(stage.name for stage in STAGES if stage.name in self.stages)

    def divided(self) -> tuple[str, ...]:
        """The shared stages in which variants differ, in pipeline order."""
        return tuple(row.name for row in STAGES if row.shared and len(self.stages.get(row.name, ())) > 1)

    def home(self, stage: str, variant: str) -> str:
        """The variant in whose folder the output lies that a variant uses; "" for the run's own folder.

        Raises:
            ConfigError: no such variant.
        """
        homes = self.homes[stage]
        if variant not in homes:
            raise ConfigError(
                f"a variant of run {self.name}: {', '.join(homes)}",
                found=repr(variant),
                where="variant",
                fix="name one of them, or list it under `variants` of the experiment",
            )
        return homes[variant]

    def config(self, stage: str, variant: str = "") -> Any:
        """The frozen configuration of a stage, for a variant; without one, of a stage that all variants share."""
        return self.stages[stage][self.home(stage, variant) if variant else ""]

    def base(self, variant: str) -> str:
        """The training that a variant starts from, as run/variant; "" for none."""
        return qualified(self.config("train", variant).base, self.name)


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
        ConfigError: anything is wrong with any of them, their stages do not go together, or only some of them are on
            the embedded model.
    """
    variants = tuple(composed)
    first = composed[variants[0]]
    known = {"name", "model", "variants"} | {stage.name for stage in STAGES}
    unknown = sorted(set(first) - known)
    if unknown:
        raise ConfigError(
            "top-level keys " + ", ".join(sorted(known)), found=", ".join(unknown), where="config", fix="remove them"
        )
    rows = _rows(composed)
    homes: dict[str, dict[str, str]] = {}
    stages: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, dict]] = {}
    for row in rows:
        homes[row.name] = _homes(row, rows, composed)
        owners = {home: home or variants[0] for home in homes[row.name].values()}
        plain[row.name] = {home: composed[owner].get(row.name, {}) for home, owner in owners.items()}
        cls = config_class(row.name)
        stages[row.name] = {home: decode(cls, data, row.name) for home, data in plain[row.name].items()}
    run = Run(first["name"], variants, homes, stages, plain)
    check_together(
        run.name, {variant: {row.name: run.config(row.name, variant) for row in rows} for variant in variants}
    )
    _note_undefined_graphs(run)
    return run


def _note_undefined_graphs(run: Run) -> None:
    """Have stage attribute of every variant know whether its transcoder can be traced: its units depend on it."""
    for variant in run.variants:
        reason = run.config("train", variant).architecture.untraceable
        if reason:
            cfg, plain = run.stages["attribute"], run.plain["attribute"]
            cfg[variant] = dataclasses.replace(cfg[variant], undefined=reason)
            plain[variant] = {**plain[variant], "undefined": reason}


def _rows(composed: dict[str, dict]) -> list[Stage]:
    """The stages of a run: all of them on the embedded model, without its own stage on another."""
    embedded = {variant: tree["model"]["source"] == OPTIONAL_UPSTREAM for variant, tree in composed.items()}
    if len(set(embedded.values())) > 1:
        odd = next(variant for variant, here in embedded.items() if here != next(iter(embedded.values())))
        raise ConfigError(
            "variants that are all on the embedded model, or none of them",
            found=f"model.source={composed[odd]['model']['source']}",
            where=f"variants.{odd}",
            fix="make another experiment for the other model",
        )
    return [row for row in STAGES if row.name != OPTIONAL_UPSTREAM or all(embedded.values())]


def _homes(row: Stage, rows: list[Stage], composed: dict[str, dict]) -> dict[str, str]:
    """Variant -> home of a stage; `Run` says what that is."""
    if not row.shared:
        return {variant: variant for variant in composed}
    names = [one.name for one in rows if one.shared and (one is row or one.name in _upstream_of(row.name))]
    content = {variant: [tree.get(name, {}) for name in names] for variant, tree in composed.items()}
    groups = list(content.values())
    if all(one == groups[0] for one in groups):
        return dict.fromkeys(composed, "")
    return {variant: next(owner for owner in composed if content[owner] == content[variant]) for variant in composed}


def _upstream_of(name: str) -> set[str]:
    """Every stage that a stage depends on, directly or not."""
    direct = stage_row(name).upstream
    return set(direct).union(*(_upstream_of(one) for one in direct))
