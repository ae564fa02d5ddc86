"""How fast the jobs of a run were: from its manifests, their timing.json, and the metrics of trainings. No torch here.

A job is measured if its manifest is there, and those of what it was made from, which say how much work it was. Jobs
that continued an earlier one are left out, because their own time is not all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

from circuitmill.config.decode import decode
from circuitmill.config.model import ModelConfig
from circuitmill.config.run import config_class
from circuitmill.errors import ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM, STAGES
from circuitmill.pipeline import stage as stage_row
from circuitmill.stages.cost_jobs import Key, gather_rule, unit_rule
from circuitmill.stages.cost_models import ModelShape, embedded, model_shape
from circuitmill.stages.cost_work import Activity, Real, Setting, Work, stage_work, unit_work
from circuitmill.stores.manifest import NAME, Manifest, read_manifest
from circuitmill.stores.metrics import METRICS, read_metrics
from circuitmill.stores.timing import read_timing

_APART = 2
"""Times the work of the smallest job that the largest must have, for a line through them to tell something."""
_BASE = "base"
"""An input that is another training, which says nothing about the work."""


@dataclass(frozen=True)
class Sample:
    """A finished job."""

    work: Real
    seconds: Real
    device: str
    """As timing.json names it; empty if an earlier version did not note it."""
    ranks: int
    fixed: Real | None = None
    """Seconds of them that do not depend on the work, if that is known."""


@dataclass(frozen=True)
class Rate:
    """Finished jobs of one rule, and with them the time of others: fixed + work x per_work / ranks.

    The fixed part of a training is what its metrics do not count as steps: loading, measurements, checkpoints. Of other
    jobs it follows from the line that fits them best, if one does twice the work of another; else it is nothing. In
    each case the jobs themselves get the time that they took, added up.
    """

    samples: tuple[Sample, ...]

    @property
    def work(self) -> Real:
        """Of all of them."""
        return sum(each.work for each in self.samples)

    @property
    def fixed(self) -> Real:
        """Seconds of a job that do not depend on its work."""
        known = [each.fixed for each in self.samples if each.fixed is not None]
        return fmean(known) if len(known) == len(self.samples) else self._intercept

    @property
    def per_work(self) -> Real:
        """Seconds of a rank for a unit of work."""
        return sum((each.seconds - self.fixed) * each.ranks for each in self.samples) / self.work

    @cached_property
    def _intercept(self) -> Real:
        works, seconds = [each.work for each in self.samples], [each.seconds for each in self.samples]
        if max(works) < _APART * min(works) or any(each.ranks > 1 for each in self.samples):
            return 0.0
        slope, intercept = linear_regression(works, seconds)
        return intercept if slope > 0 and intercept > 0 else 0.0

    def seconds(self, work: Real, ranks: int) -> Real:
        """Of a job."""
        return self.fixed + work * self.per_work / ranks

    @property
    def devices(self) -> list[str]:
        """On which they ran."""
        return sorted({each.device for each in self.samples})


@dataclass(frozen=True)
class Measured:
    """What a finished or partly finished run tells."""

    folder: Path
    rates: dict[Key, Rate]
    activities: dict[str, Activity]
    """Of its trainings, by variant."""
    batch_tokens: frozenset[int]
    """Of its trainings."""
    problems: dict[str, str]
    """Rule -> why jobs of it that are there tell nothing."""

    def rate(self, rule: str, home: str) -> Rate | None:
        """Of the same variant if it has been measured, else of all there are."""
        found = self.behind(rule, [home])
        return Rate(tuple(each for rate in found for each in rate.samples)) if found else None

    def behind(self, rule: str, homes: Sequence[str]) -> list[Rate]:
        """What the rates of some variants are taken from: their own if all have one, else all there are."""
        found = {home: rate for (name, home), rate in self.rates.items() if name == rule}
        return [found[home] for home in homes] if found.keys() >= set(homes) else list(found.values())

    def activity(self, variant: str) -> Activity | None:
        """The same of what a training settles on."""
        if variant in self.activities or not self.activities:
            return self.activities.get(variant)
        found = self.activities.values()
        return Activity(fmean(each.l0 for each in found), fmean(each.few for each in found))


@dataclass(frozen=True)
class _Job:
    """A finished job."""

    home: str
    manifest: Manifest
    digest: str | None

    @property
    def rule(self) -> str:
        name = self.manifest.stage
        return gather_rule(name) if self.manifest.unit is None else unit_rule(stage_row(name))


def measure(folder: Path, shapes: Mapping[str, ModelShape] | None = None) -> Measured:
    """Read a run.

    Args:
        folder: results/<run>.
        shapes: Of models, by name, that are not known otherwise.

    Raises:
        ConfigError: there is no manifest.
        UpstreamError: a manifest or a file of times is unreadable.
    """
    jobs = list(_jobs(folder))
    if not jobs:
        raise ConfigError(
            "a run of which at least one job is finished",
            found="no manifest",
            where=folder,
            fix="name a folder below results/; a shard of the cache and a short training tell most",
        )
    by_digest = {job.digest: job.manifest for job in jobs if job.digest is not None}
    activities = {job.home: found for job in jobs if (found := _activity(job.manifest)) is not None}
    rates: dict[Key, Rate] = {}
    problems: dict[str, str] = {}
    for job in jobs:
        found = _sample(job, by_digest, activities.get(job.home), shapes or {})
        if isinstance(found, str):
            problems[job.rule] = found
        else:
            key = job.rule, job.home
            rates[key] = Rate((*(rates[key].samples if key in rates else ()), found))
    batches = frozenset(job.manifest.config["batch_tokens"] for job in jobs if job.manifest.stage == "train")
    return Measured(folder, rates, activities, batches, problems)


def _jobs(folder: Path) -> Iterator[_Job]:
    """All manifests of a run, those of its own folder first."""
    homes = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
    for home in homes:
        name = "" if home is folder else home.name
        for row in STAGES:
            own = home / row.name
            for path in [own / NAME, *(sorted(own.glob(f"{row.unit}/*/{NAME}")) if row.unit else [])]:
                if path.is_file():
                    manifest, digest = read_manifest(path, row.name)
                    yield _Job(name, manifest, digest)


def _activity(manifest: Manifest) -> Activity | None:
    """Mean over the rows of a training's metrics, which are about equally far apart."""
    path = manifest.folder / METRICS
    if manifest.stage != "train" or not path.is_file():
        return None
    rows = read_metrics(path)
    if not rows or "sparse_layers" not in rows[0]:
        return None
    return Activity(
        fmean(fmean(row["l0"]) for row in rows),
        fmean(row["sparse_layers"] / len(row["l0"]) for row in rows),
    )


def _sample(
    job: _Job, by_digest: Mapping[str, Manifest], activity: Activity | None, shapes: Mapping[str, ModelShape]
) -> Sample | str:
    """How long a job took, or why that tells nothing."""
    manifest = job.manifest
    timing = read_timing(manifest.folder)
    if not timing:
        return "no timing.json"
    if timing["continued"]:
        return "it continued an earlier job, whose time was not noted"
    lineage = _lineage(manifest, by_digest)
    if isinstance(lineage, str):
        return lineage
    try:
        work = _work(manifest, _setting(lineage, activity, shapes))
    except ConfigError as error:
        return f"its configuration cannot be read: {error.where}: expected {error.expected}, found {error.found}"
    if not work:
        return "the shape of its model is not known: --shape" if manifest.stage != "train" else "no metrics.jsonl"
    seconds = timing["wall_seconds"]
    return Sample(work, seconds, timing["device"], timing["ranks"], _fixed(manifest, seconds))


def _fixed(manifest: Manifest, seconds: Real) -> Real | None:
    """Of a training: seconds that are no steps, by the speed that its metrics note."""
    if manifest.stage != "train":
        return None
    rows = read_metrics(manifest.folder / METRICS)
    steps = [(after["tokens"] - before["tokens"], after.get("tokens_per_second")) for before, after in pairwise(rows)]
    known = [(tokens, speed) for tokens, speed in steps if speed]
    if not known:
        return None
    speed = sum(tokens for tokens, _ in known) / sum(tokens / speed for tokens, speed in known)
    return max(0.0, seconds - manifest.counts["tokens"] / speed)


def _lineage(manifest: Manifest, by_digest: Mapping[str, Manifest]) -> dict[str, Manifest] | str:
    """Stage -> what a job was made from, directly or not, and itself; or what is missing."""
    found = {manifest.stage: manifest}
    for stage, digest in manifest.inputs.items():
        if stage == _BASE:
            continue
        if digest not in by_digest:
            return f"the {stage} that it was made from is not there"
        before = _lineage(by_digest[digest], by_digest)
        if isinstance(before, str):
            return before
        found = before | found
    return found


def _setting(lineage: Mapping[str, Manifest], activity: Activity | None, shapes: Mapping[str, ModelShape]) -> Setting:
    configs: dict[str, Any] = {name: decode(config_class(name), each.config, name) for name, each in lineage.items()}
    world, tokens = configs.get(OPTIONAL_UPSTREAM), lineage.get("tokenize")
    cached = configs.get("cache") or configs.get("calibrate")
    named = [cached.model, cached.second_model] if cached is not None else []
    found = [_shape(each, world and world.transformer, shapes) for each in named if each is not None]
    if not named and world is not None:
        found = [embedded(world.transformer)]
    models = tuple(each for each in found if each is not None)
    counts = next((lineage[name].counts for name in ("cache", "calibrate") if name in lineage), {})
    return Setting(
        configs,
        models if len(models) == len(found) else (),
        (counts.get("n_layers", 0), counts.get("d_model", 0)),
        tokens.counts["sequences"] if tokens is not None else {},
        activity=activity,
    )


def _shape(cfg: ModelConfig, transformer: Any, shapes: Mapping[str, ModelShape]) -> ModelShape | None:
    return model_shape(cfg, transformer) or shapes.get(cfg.name)


def _work(manifest: Manifest, setting: Setting) -> Work:
    return (
        stage_work(manifest.stage, setting)
        if manifest.unit is None
        else unit_work(manifest.stage, setting)[manifest.unit]
    )
