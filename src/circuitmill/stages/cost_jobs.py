"""The jobs of a run as the workflow has them, what each waits for, and how long they take on so many places."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from circuitmill.config.run import Run
from circuitmill.config.site import full_groups
from circuitmill.errors import ConfigError
from circuitmill.pipeline import Stage
from circuitmill.pipeline import stage as stage_row
from circuitmill.stages.cost_work import Real, Setting, Work, stage_work, total, unit_work

Key = tuple[str, str]
"""Rule, and the variant in whose folder its output lies; empty for the run's own."""

GPU_RULES = ("run_calibrate", "cache_shard", "run_train", "run_evaluate", "features_block", "attribute_prompt")
"""Rules that use a GPU where the profiles give them one."""
TRAIN = "run_train"


@dataclass(frozen=True)
class Places:
    """Where jobs run."""

    gpus: bool
    """Whether places are GPUs; else CPU ranks."""
    ranks: int
    """Places that a training takes; every other job takes one."""
    nodes: int = 1
    per_node: int = 0
    """Places of a node; 0 for as many as a training takes."""

    def __post_init__(self) -> None:
        for key, value in (("--nodes", self.nodes), ("--gpus-per-node", self.per_node + 1)):
            if value <= 0:
                raise ConfigError("a number above 0", found=value, where=key, fix="correct the value")
        if self.ranks > self.total:
            raise ConfigError(
                f"at least the {self.ranks} ranks of a training",
                found=f"{self.nodes} x {self.per_node}",
                where="--nodes and --gpus-per-node",
                fix="plan for more nodes, or give a training fewer ranks",
            )

    @property
    def total(self) -> int:
        """On all nodes."""
        return self.nodes * (self.per_node or self.ranks)

    def width(self, rule: str) -> int:
        """Places that a job takes."""
        return self.ranks if rule == TRAIN else 1


@dataclass(frozen=True)
class Group:
    """Jobs of one rule with the same output folder, which do not wait for each other."""

    rule: str
    stage: str
    home: str
    jobs: tuple[tuple[Work, ...], ...]
    """Work of each unit that each job does, one after the other."""
    needs: tuple[Key, ...]
    """Groups that must be finished before one of these starts."""

    @property
    def key(self) -> Key:
        """By which others name it."""
        return self.rule, self.home

    @property
    def work(self) -> Work:
        """Of all jobs together."""
        return total([work for job in self.jobs for work in job])


def unit_rule(row: Stage) -> str:
    """The rule of the units of a stage."""
    return f"{row.name}_{row.unit}"


def gather_rule(name: str) -> str:
    """The rule of a stage, which gathers the units if there are any."""
    return f"run_{name}"


def configure_jobs(run: Run) -> int:
    """Jobs that write a frozen configuration each."""
    return sum(map(len, run.stages.values()))


def groups(run: Run, settings: Mapping[str, Setting], shards_per_job: int = 1) -> list[Group]:
    """All jobs of a run but those that write configurations, in pipeline order.

    Args:
        run: The run.
        settings: By variant.
        shards_per_job: Shards of the cache that one job makes.
    """
    units = [cfg.units() for cfg in run.stages["cache"].values()]
    heads = full_groups(units, shards_per_job) if shards_per_job > 1 else []
    found = []
    for name in run.stage_names():
        row = stage_row(name)
        for home in run.stages[name]:
            variant = home or run.variants[0]
            needs = tuple(_upstream(run, row, variant))
            setting = settings[variant]
            if row.unit is not None and run.stages[name][home].units():
                works = unit_work(name, setting)
                found.append(
                    Group(unit_rule(row), name, home, _together(works, heads if name == "cache" else []), needs)
                )
                needs += ((unit_rule(row), home),)
            found.append(Group(gather_rule(name), name, home, ((stage_work(name, setting),),), needs))
    return found


def _together(works: Mapping[str, Work], heads: Sequence[str]) -> tuple[tuple[Work, ...], ...]:
    """Units by job, where those that have one of these in front are made by one."""
    jobs = [tuple(work for name, work in works.items() if name.startswith(head)) for head in heads]
    return (*jobs, *((work,) for name, work in works.items() if not name.startswith(tuple(heads))))


def _upstream(run: Run, row: Stage, variant: str) -> Sequence[Key]:
    """What a stage of a variant reads, as the inputs of its rule say."""
    found = [(gather_rule(name), run.home(name, variant)) for name in row.upstream if name in run.stages]
    if row.name == "train":
        base, _, other = run.base(variant).partition("/")
        found += [(gather_rule("train"), other)] if base == run.name and other else []
    if row.name == "report":
        found += [(gather_rule("evaluate"), other) for other in run.variants if other != variant]
        study = [*run.divided(), "train", "evaluate", "attribute"] if run.divided() else []
        found += [(gather_rule(name), home) for name in study for home in run.stages[name]]
    return list(dict.fromkeys(found))


def at_once(found: Sequence[Group]) -> dict[str, int]:
    """By rule, the most jobs of which none waits for another one of them.

    All of them, but for trainings: of those from which another one starts, the last of each chain.
    """
    waited_for = {need for group in found for need in group.needs if need[0] == group.rule}
    counts: dict[str, int] = {}
    for group in found:
        counts[group.rule] = counts.get(group.rule, 0) + (0 if group.key in waited_for else len(group.jobs))
    return counts


def wall_times(
    found: Sequence[Group],
    seconds: Callable[[Group], Sequence[Real]],
    places: int,
    width: Callable[[Group], int],
) -> dict[Key, tuple[Real, Real]]:
    """When each group starts and ends, if jobs are started in pipeline order as soon as there is room.

    A job for which there is no room yet is waited for: no later one of those that are ready is started in its place.

    Args:
        found: All groups.
        seconds: Of each job of a group.
        places: Jobs of width 1 that run at a time.
        width: Places that a job of a group takes, at most all.
    """
    order = {group.key: index for index, group in enumerate(found)}
    by_key = {group.key: group for group in found}
    open_needs = {group.key: set(group.needs) for group in found}
    ready = [
        (order[key], number)
        for key, needs in open_needs.items()
        if not needs
        for number in range(len(by_key[key].jobs))
    ]
    heapq.heapify(ready)
    left = {group.key: len(group.jobs) for group in found}
    durations = {group.key: seconds(group) for group in found}
    running: list[tuple[Real, int]] = []
    spans: dict[Key, tuple[Real, Real]] = {}
    now, free = 0.0, places
    while ready or running:
        while ready and width(found[ready[0][0]]) <= free:
            index, number = heapq.heappop(ready)
            group = found[index]
            free -= width(group)
            heapq.heappush(running, (now + durations[group.key][number], index))
            spans[group.key] = (spans.get(group.key, (now, now))[0], now)
        now, index = heapq.heappop(running)
        group = found[index]
        free += width(group)
        left[group.key] -= 1
        spans[group.key] = (spans[group.key][0], now)
        if left[group.key]:
            continue
        for key, needs in open_needs.items():
            if group.key in needs:
                needs.discard(group.key)
                if not needs:
                    for number in range(len(by_key[key].jobs)):
                        heapq.heappush(ready, (order[key], number))
    return spans
