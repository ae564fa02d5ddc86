"""What a plan says in words: how to measure, and what its figures leave out or take for granted."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from circuitmill.config.run import Run
from circuitmill.stages import cost
from circuitmill.stages.cost import Disk
from circuitmill.stages.cost_jobs import TRAIN, Group, Key, Places
from circuitmill.stages.cost_measured import Measured, Rate
from circuitmill.stages.cost_work import Setting

SHORT = "-short"
_SHORT_JOB, _FAR = 60, 10
"""Seconds of a job that is mostly its beginning, and times its work that are far from it."""
_TRIAL_STEPS, _TRIAL_TOKENS = 200, 1_000_000
"""Of a short run that is to be measured: at most."""


def trial(run: Run, before: Sequence[str]) -> str:
    """A command that runs the same with little text, to be measured.

    Args:
        run: The run.
        before: Overrides with which it was made.
    """
    trains = [run.config("train", variant) for variant in run.variants]
    caches = list(run.stages["cache"].values())
    steps = min(_TRIAL_STEPS, *(cfg.steps for cfg in trains))
    train = max(_TRIAL_TOKENS, *(4 * cfg.batch_tokens for cfg in trains))
    # tokens that are BOS do not count there
    heldout = 2 * max(
        max(cfg.monitor.heldout_tokens, cfg.monitor.behaviour_tokens, cfg.nonlinearity.calibration_tokens)
        for cfg in trains
    )
    tokens = {
        "train": min([train, *(cfg.train_tokens for cfg in caches if cfg.train_tokens)]),
        "heldout": min([heldout, *(cfg.heldout_tokens for cfg in caches if cfg.heldout_tokens)]),
    }
    overrides = [*before, f"name={run.name}{SHORT}", f"train.tokens={steps * max(cfg.batch_tokens for cfg in trains)}"]
    overrides += ["train.warmup_tokens=0"]
    for split, number in tokens.items():
        overrides += [f"cache.{split}_tokens={number}", f"cache.{split}_shards=1"]
        if not run.has_toyworld:
            overrides.append(f"tokenize.max_{split}_tokens={number}")
    return f"snakemake all --config run={run.name} {shlex.quote('set=' + shlex.join(overrides))}"


def notes(
    jobs: Sequence[Group],
    settings: Mapping[str, Setting],
    disk: Disk,
    found: Measured | None,
    rates: Mapping[Key, Rate | str],
    places: Places,
) -> Iterator[str]:
    """What the figures leave out or take for granted."""
    if disk.unknown:
        yield (
            f"size not known: {', '.join(disk.unknown)}; the text decides (tokenize.max_train_tokens) or a model that "
            "is not known (--shape)"
        )
    yield f"not counted on disk: {cost.NOT_COUNTED}; quotas are not looked at (--disk)"
    if found is None:
        return
    known = {key: rate for key, rate in rates.items() if isinstance(rate, Rate)}
    if any("" in rate.devices for rate in known.values()):
        yield "some of the measured jobs do not say on what device they ran"
    ranks = {each.ranks for (rule, _), rate in known.items() if rule == TRAIN for each in rate.samples}
    if ranks - {places.ranks}:
        yield f"ranks of a training: {places.ranks}, and {_listed(ranks)} when measured; each is taken to be as fast"
    stretched = list(dict.fromkeys(group.rule for group in jobs if _stretched(group, known.get(group.key))))
    if stretched:
        yield (
            f"{', '.join(stretched)}: measured in jobs of less than {_SHORT_JOB} s that did less than a {_FAR}th "
            "of the work; what such a job takes before it works is scaled too, so that this is too much"
        )
    planned = {setting.configs["train"].batch_tokens for setting in settings.values()}
    if any(rule == TRAIN for rule, _ in known) and found.batch_tokens != planned:
        yield (
            f"training was measured with {_listed(found.batch_tokens)} tokens a step, and is planned with "
            f"{_listed(planned)}: the update of parameters costs as much per step, which is not scaled"
        )
    yield "not counted in times: queues, start of jobs and of Python, a training's continuations"


def _stretched(group: Group, rate: Rate | None) -> bool:
    """Whether the time of a job is mostly what a short one took to begin."""
    if rate is None or rate.fixed:
        return False
    longest = max(rate.samples, key=lambda each: each.work)
    return longest.seconds < _SHORT_JOB and max(work or 0.0 for job in group.jobs for work in job) > _FAR * longest.work


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
