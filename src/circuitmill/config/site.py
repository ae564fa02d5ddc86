"""Where a run runs: the names of a cluster and what the jobs of each rule get there. Not part of what a run is.

A profile names a site file (`where` in Snakemake's configuration, or $CIRCUITMILL_SITE), and the rules ask `Site` for
their resources. Without a site file jobs get what their rules say, on this machine.
"""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError

ENVIRONMENT = "CIRCUITMILL_SITE"
MOST_SHARDS_PER_JOB = 10_000
SIGNALLED = ("run_train",)
"""Rules whose command writes a checkpoint when it is warned, so that the next attempt continues: they get a warning
before the time limit, and each attempt the same time and memory."""


@dataclass(frozen=True)
class RuleSite:
    """What the jobs of one rule get here."""

    nodes: int = 1
    """Nodes of a job; more than 1 for run_train alone, which starts one launcher on each."""
    gpus: int = 0
    """GPUs on each node; a training has a rank per GPU, or one on each node without."""
    all_gpus: bool = False
    """All GPUs of this machine instead (scheduler local)."""
    cpus: int | None = None
    """CPUs on each node; null leaves the rule's number of threads."""
    mem_mb: int | None = None
    """Memory on each node in MB, of the first attempt; null leaves the rule's."""
    runtime: int | None = None
    """Time limit in minutes, of the first attempt; null leaves the rule's."""
    partition: str | None = None
    """Instead of the site's."""
    qos: str | None = None
    """Instead of the site's."""
    constraint: str | None = None
    """Instead of the site's."""
    gpu_model: str | None = None
    """Instead of the site's."""
    extra: str = ""
    """Further options of sbatch, such as --exclusive."""

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("gpus", 0), ("cpus", 1), ("mem_mb", 1), ("runtime", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(
                    f"at least {least}", found=value, where=f"site.rules.*.{key}", fix="correct the number"
                )


@dataclass(frozen=True)
class Site:
    """A cluster with Slurm, or one machine with GPUs."""

    scheduler: Literal["slurm", "local"]
    """Who starts jobs: slurm, or Snakemake on this machine."""
    account: str | None = None
    """That pays for the jobs; null is the one that Slurm takes by itself."""
    partition: str | None = None
    """Of jobs that ask for no GPU; null is the cluster's default."""
    gpu_partition: str | None = None
    """Of jobs that ask for GPUs."""
    qos: str | None = None
    """Quality of service; null is the default of account and partition."""
    constraint: str | None = None
    """Features that nodes must have, in Slurm's words: a100, or a100&nvlink."""
    reservation: str | None = None
    """Reservation to run in."""
    gpu_model: str | None = None
    """Type of the GPUs, as `sinfo -o %G` names it; null takes any."""
    warn_s: int = 120
    """Seconds before the time limit at which a training is to write a checkpoint; Slurm is up to a minute early."""
    shards_per_job: int = 1
    """Shards of stage cache in one job: 1, 10, 100, ... What a split has beyond a multiple gets jobs of one."""
    max_mem_mb: int | None = None
    """Memory that no attempt asks more than; null if there is no limit."""
    max_runtime: int | None = None
    """Minutes that no attempt asks more than."""
    modules: tuple[str, ...] = ()
    """Environment modules of every job, with --software-deployment-method env-modules."""
    rules: dict[str, RuleSite] = field(default_factory=dict)
    """What single rules get, by their names; run_cache and the like get theirs apart from cache_shard's."""

    def __post_init__(self) -> None:
        for key, least in (("warn_s", 1), ("max_mem_mb", 1), ("max_runtime", 1)):
            value = getattr(self, key)
            _require(value is None or value >= least, f"at least {least}", value, key)
        sizes = [10**power for power in range(len(str(MOST_SHARDS_PER_JOB)))]
        _require(
            self.shards_per_job in sizes, "one of " + ", ".join(map(str, sizes)), self.shards_per_job, "shards_per_job"
        )
        for name, rule in self.rules.items():
            _require(
                rule.nodes == 1 or name in SIGNALLED, "1 node: only a training has ranks", rule.nodes, f"{name}.nodes"
            )
            _require(not rule.all_gpus or self.scheduler == "local", "false with Slurm", True, f"{name}.all_gpus")
            _require(not (rule.all_gpus and rule.gpus), "either gpus or all_gpus", "both", f"{name}.gpus")

    def rule(self, name: str) -> RuleSite:
        """What a rule gets here."""
        return self.rules.get(name, RuleSite())

    def cpus(self, name: str, threads: int) -> int:
        """Threads of a rule's job.

        Args:
            name: Of the rule.
            threads: That the rule asks for itself.
        """
        return self.rule(name).cpus or threads

    def shares(self, gpus_here: int) -> str:
        """GPUs of a job of each rule that has any, on this machine: cache_shard=1,run_train=4."""
        numbers = {name: gpus_here if rule.all_gpus else rule.gpus for name, rule in self.rules.items()}
        return ",".join(f"{name}={number}" for name, number in numbers.items() if number)

    def resources(
        self, name: str, *, mem_mb: int, runtime: int, threads: int, times: int = 1, gpus_here: int = 0
    ) -> dict[str, Any]:
        """What a rule's job asks for, by Snakemake's names of resources.

        Memory and time grow by half with each attempt, up to twice the first; not for a rule that continues.

        Args:
            name: Of the rule.
            mem_mb: Memory that the rule asks for itself, in MB.
            runtime: The same for the time limit, in minutes.
            threads: The same for CPUs.
            times: How many units of work a job does, one after the other.
            gpus_here: GPUs of this machine, for a rule that takes all.

        Raises:
            ConfigError: the time limit leaves no time before the warning.
        """
        own = self.rule(name)
        fixed = name in SIGNALLED
        minutes = (own.runtime or runtime) * times
        asked: dict[str, Any] = {
            "mem_mb": growing(own.mem_mb or mem_mb, self.max_mem_mb, fixed=fixed),
            "runtime": growing(minutes, self.max_runtime, fixed=fixed),
        }
        gpus = gpus_here if own.all_gpus else own.gpus
        if self.scheduler == "local":
            return asked | {"gpu": gpus}
        words = {
            "slurm_account": self.account,
            "slurm_partition": own.partition or (self.gpu_partition if gpus else self.partition),
            "qos": own.qos or self.qos,
            "constraint": own.constraint or self.constraint,
        }
        asked |= {key: value for key, value in words.items() if value is not None}
        asked["cpus_per_task"] = own.cpus or threads
        asked |= _gpus(gpus, own.gpu_model or self.gpu_model, own.nodes)
        extra = [own.extra] if own.extra else []
        if self.reservation is not None:
            extra.append(f"--reservation={self.reservation}")
        if fixed:
            limit = 60 * min(minutes, self.max_runtime or minutes)
            _require(self.warn_s < limit, f"less than the time limit of {name}, {limit} s", self.warn_s, "warn_s")
            # without B: it goes to the job's steps; Snakemake, which is in one, ignores it (workflow/rules/where.smk)
            extra.append(f"--signal=USR1@{self.warn_s}")
        return asked | ({"slurm_extra": " ".join(extra)} if extra else {})


def _require(good: bool, expected: str, found: object, key: str) -> None:
    if not good:
        raise ConfigError(expected, found=found, where=f"site.{key}", fix="correct the site file")


def _gpus(gpus: int, model: str | None, nodes: int) -> dict[str, Any]:
    """On one node by number and type; on several by what each has, with one launcher per node."""
    if nodes == 1:
        # with `tasks` there would be as many tasks as GPUs
        return {"gpu": gpus, "tasks_per_gpu": 0} | ({"gpu_model": model} if model else {}) if gpus else {}
    several: dict[str, Any] = {"mpi": "srun", "nodes": nodes, "tasks": nodes}
    if gpus:
        several |= {"tasks_per_gpu": 0, "gres": f"gpu:{model}:{gpus}" if model else f"gpu:{gpus}"}
    return several


def growing(first: int, most: int | None = None, *, fixed: bool = False) -> Callable[..., int]:
    """A resource of Snakemake that grows with the attempt: once, one and a half times, then twice what it was at first.

    >>> [growing(1001)(None, attempt) for attempt in (1, 2, 3, 4)]
    [1001, 1502, 2002, 2002]
    >>> growing(1000, 1200)(None, 3), growing(1000, fixed=True)(None, 3)
    (1200, 1000)
    """

    def of(wildcards: object, attempt: int) -> int:
        grown = first if fixed else -(-first * (1 + min(attempt, 3)) // 2)
        return grown if most is None else min(grown, most)

    return of


def full_groups(units: Sequence[Sequence[str]], size: int) -> list[str]:
    """What numbered units that one job can do together have in common in front, if all of them are there.

    Args:
        units: Names of the units in each variant that has its own; groups are those that all of them have.
        size: Units in a group, a power of ten.

    >>> full_groups([[f"train-{i:05d}" for i in range(25)] + ["heldout-00000"]], 10)
    ['train-0000', 'train-0001']
    """
    digits = len(str(size)) - 1
    counts = [Counter(name[: len(name) - digits] for name in names) for names in units]
    return [head for head in counts[0] if all(count[head] == size for count in counts)] if counts else []


def load_site(named: str | None, env: Mapping[str, str] = os.environ) -> Site | None:
    """Read the site file that a profile or the environment names; None if neither does.

    Args:
        named: Its path, by the profile.
        env: The environment's variables.

    Raises:
        ConfigError: no such file, not YAML, or not a site.
    """
    import yaml

    path = env.get(ENVIRONMENT) or named
    if path is None:
        return None
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            "a site file with the names of your cluster",
            found="no such file",
            where=path,
            fix=f"cp {Path(path).with_suffix('.example.yaml')} {path}, and edit it",
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("a site file in YAML", found=error, where=path, fix="correct the file") from error
    return decode(Site, data, "site")


def gpus_here(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them; without starting CUDA.

    Raises:
        ConfigError: the driver's tool is there and fails.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip())
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            "a list of GPUs",
            found=error,
            where="nvidia-smi --list-gpus",
            fix="mend the driver, or set CUDA_VISIBLE_DEVICES",
        ) from error
    return tuple(str(index) for index, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU "))


def memory_here_mb() -> int:
    """Memory of this machine, in MB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
