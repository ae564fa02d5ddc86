"""What a whole run costs before it is started: tokens, disk, jobs and, from what another run took, time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from circuitmill.config.run import Run
from circuitmill.config.site import MOST_SHARDS_PER_JOB
from circuitmill.errors import ConfigError
from circuitmill.stages import cost
from circuitmill.stages import cost_notes as notes
from circuitmill.stages.cost import Disk
from circuitmill.stages.cost_jobs import GPU_RULES, Group, Key, Places, at_once, configure_jobs, groups, wall_times
from circuitmill.stages.cost_measured import Measured, Rate, measure
from circuitmill.stages.cost_models import ModelShape
from circuitmill.stages.cost_work import Real, Setting, total
from circuitmill.stores.manifest import load_manifest


@dataclass(frozen=True)
class Tokens:
    """What a stage of some variants works on, BOS included; None if the text decides."""

    stage: str
    variants: tuple[str, ...]
    """Empty if it is the run's own."""
    train: int | None
    heldout: int | None
    note: str = ""


@dataclass(frozen=True)
class Jobs:
    """Jobs of a rule, over all variants."""

    rule: str
    jobs: int
    at_once: int
    """That do not wait for each other."""
    seconds: Real | None = None
    """Of all of them, times the places that each takes; None if it is not known."""
    longest: Real | None = None
    """Seconds of the longest."""
    scaled: Real | None = None
    """Their work by what was measured."""
    devices: tuple[str, ...] = ()
    """On which it was measured."""
    why: str = ""
    """Why the time is not known."""


@dataclass(frozen=True)
class RunPlan:
    """What a whole run costs."""

    run: str
    variants: tuple[str, ...]
    places: Places
    about: bool
    """Whether tokens are an estimate of what the embedded corpus makes."""
    tokens: list[Tokens]
    disk: Disk
    caches: dict[str, int | None]
    """Bytes of the cache that each variant uses; None if that is not known."""
    configure: int
    """Jobs that write configurations."""
    jobs: list[Jobs]
    measured: Path | None
    wall_seconds: Real | None
    """From the first job to the last, of those whose time is known; None if none is."""
    ends: dict[str, Real]
    """Stage -> seconds until its last job ends."""
    trial: str
    """A command that runs the same with little text, to be measured."""
    warnings: list[str]
    notes: list[str]

    def besides(self, variant: str) -> int:
        """Bytes of everything that the run stores but the cache of a variant."""
        return self.disk.bytes - (self.caches.get(variant) or 0)

    @property
    def trial_name(self) -> str:
        """Of the run that it makes."""
        return f"{self.run}{notes.SHORT}"

    @property
    def n_jobs(self) -> int:
        """All of them; Snakemake counts its target on top."""
        return self.configure + sum(row.jobs for row in self.jobs)

    @property
    def unknown(self) -> list[str]:
        """Rules whose time is not known."""
        return [row.rule for row in self.jobs if row.seconds is None]

    @property
    def gpu_seconds(self) -> Real:
        """Of all jobs that use a GPU and whose time is known."""
        return sum(row.seconds or 0.0 for row in self.jobs if row.rule in GPU_RULES)


def plan_run(
    run: Run,
    overrides: Sequence[str],
    places: Places,
    folder: Path,
    *,
    disk: int = 0,
    shape: ModelShape | None = None,
    cache: Path | None = None,
    measured: Path | None = None,
    shards_per_job: int = 1,
) -> RunPlan:
    """Plan a run.

    Args:
        run: The run.
        overrides: With which it was made of its experiment.
        places: Where its jobs run.
        folder: results/<run>, which need not be there.
        disk: Bytes that the run may take; 0 for what is free there.
        shape: Of its language model, if that is not known.
        cache: manifest.json of a finished cache, which says where activations are taken if the model is not known.
        measured: results/<run> of a run that tells how fast jobs are.
        shards_per_job: Shards of the cache in one job.

    Raises:
        ConfigError: no job of the measured run is finished, or a number makes no sense.
        UpstreamError: a manifest is unreadable.
    """
    sizes = [10**power for power in range(len(str(MOST_SHARDS_PER_JOB)))]
    if shards_per_job not in sizes:
        raise ConfigError(
            "one of " + ", ".join(map(str, sizes)), found=shards_per_job, where="--shards-per-job", fix="choose one"
        )
    names = {} if shape is None else dict.fromkeys(_models(run), shape)
    found = None if measured is None else measure(measured, names)
    activities = {} if found is None else {variant: found.activity(variant) for variant in run.variants}
    counts = None if cache is None else load_manifest(cache, "cache").counts
    given = None if counts is None else (counts["n_layers"], counts["d_model"])
    settings = cost.settings_of(run, folder, shape=shape, places=given, activities=activities)
    jobs = groups(run, settings, shards_per_job)
    rates = {} if found is None else {group.key: _usable(found, group, places) for group in jobs}
    spans = (
        {}
        if not any(isinstance(rate, Rate) for rate in rates.values())
        else wall_times(
            jobs,
            lambda group: _seconds(group, rates[group.key], places),
            places.total,
            lambda group: places.width(group.rule),
        )
    )
    needed = cost.disk_of(run, settings, folder, disk or None)
    return RunPlan(
        run.name,
        run.variants,
        places,
        any(setting.about for setting in settings.values()),
        list(_tokens(run, settings)),
        needed,
        {variant: cost.size_of("cache", setting) for variant, setting in settings.items()},
        configure_jobs(run),
        list(_rows(jobs, rates, found, places)),
        measured,
        max((end for _, end in spans.values()), default=None),
        _ends(jobs, spans),
        notes.trial(run, overrides),
        [cost.warning(run, settings, needed)] if needed.short else [],
        list(notes.notes(jobs, settings, needed, found, rates, places)),
    )


def _models(run: Run) -> Iterator[str]:
    """Names of the models that a run's activations are of."""
    for cfg in run.stages["cache"].values():
        yield from (model.name for model in (cfg.model, cfg.second_model) if model is not None)


def _usable(found: Measured, group: Group, places: Places) -> Rate | str:
    """What tells how fast jobs are, or why nothing does."""
    rate = found.rate(group.rule, group.home)
    if rate is None:
        return found.problems.get(group.rule, "not measured")
    if group.work is None:
        return "the text decides how much it is"
    elsewhere = sorted(device for device in rate.devices if device and (device != "cpu") != places.gpus)
    if group.rule in GPU_RULES and elsewhere:
        return f"measured on {', '.join(elsewhere)}, planned for {'GPUs' if places.gpus else 'CPUs'}"
    return rate


def _seconds(group: Group, rate: Rate | str, places: Places) -> list[Real]:
    """Of each job."""
    if isinstance(rate, str):
        return [0.0] * len(group.jobs)
    return [sum(rate.seconds(work or 0.0, places.width(group.rule)) for work in job) for job in group.jobs]


def _rows(jobs: list[Group], rates: Mapping[Key, Rate | str], found: Measured | None, places: Places) -> Iterator[Jobs]:
    widths = at_once(jobs)
    for rule in dict.fromkeys(group.rule for group in jobs):
        own = [group for group in jobs if group.rule == rule]
        row = Jobs(rule, sum(len(group.jobs) for group in own), widths[rule])
        here = {group.key: rates.get(group.key, "nothing is measured") for group in own}
        unknown = [rate for rate in here.values() if isinstance(rate, str)]
        if unknown or found is None:
            yield replace(row, why=unknown[0])
            continue
        seconds = [second for group in own for second in _seconds(group, here[group.key], places)]
        work = total([group.work for group in own]) or 0.0
        yield replace(
            row,
            seconds=sum(seconds) * places.width(rule),
            longest=max(seconds),
            scaled=work / sum(rate.work for rate in found.behind(rule, [group.home for group in own])),
            devices=tuple(
                sorted({device for rate in here.values() if isinstance(rate, Rate) for device in rate.devices})
            ),
        )


def _ends(jobs: list[Group], spans: Mapping[Key, tuple[Real, Real]]) -> dict[str, Real]:
    found: dict[str, Real] = {}
    for group in jobs:
        if group.key in spans:
            found[group.stage] = max(found.get(group.stage, 0.0), spans[group.key][1])
    return found


def _tokens(run: Run, settings: Mapping[str, Setting]) -> Iterator[Tokens]:
    """By stage; variants that agree have one row."""
    for stage in ("tokenize", "calibrate", "cache", "train", "evaluate", "features"):
        found: dict[tuple[int | None, int | None, str], list[str]] = {}
        for home in run.stages[stage]:
            found.setdefault(_of_stage(stage, settings[home or run.variants[0]]), []).append(home)
        for (train, heldout, note), homes in found.items():
            yield Tokens(stage, tuple(filter(None, homes)), train, heldout, note)


def _of_stage(stage: str, setting: Setting) -> tuple[int | None, int | None, str]:
    """Tokens of both splits that a stage works on, and what else is to be said."""
    cfg = setting.configs[stage]
    if stage == "tokenize":
        return setting.tokens("train"), setting.tokens("heldout"), f"in sequences of {cfg.context}"
    if stage == "calibrate":
        return setting.calibrated(), 0, ""
    if stage == "cache":
        note = "streamed: the model runs beside the training" if cfg.mode == "stream" else f"{len(cfg.units())} shards"
        return setting.cached("train"), setting.cached("heldout"), note
    if stage == "train":
        tokens, there = cfg.steps * cfg.batch_tokens, setting.cached("train")
        return tokens, 0, f"{tokens / there:.2g} times the cache" if there else ""
    if stage == "evaluate":
        whole, one_layer = setting.evaluated()
        single = not setting.configs["train"].architecture.unreplaceable and one_layer is not None
        return 0, whole, f"{one_layer:,} of them once more for every layer" if single else ""
    featured = setting.featured()
    return featured["train"], featured["heldout"], f"in each of {cfg.blocks} blocks" if cfg.blocks > 1 else ""
