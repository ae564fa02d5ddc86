"""Which strategy a training can have, what each one needs, and which one to take, before anything is started.

Pure functions of the configuration, the shape of the activations and the number of ranks: memory by `memory`, bytes on
the wire by `payload`. Nothing here is measured; benchmarks/memory_plan.py compares it with trainings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from circuitmill.config.names import is_import_path
from circuitmill.config.parallel import STRATEGIES
from circuitmill.config.train import TrainConfig
from circuitmill.errors import ConfigError
from circuitmill.training.parallel.census import Census, Division, Shape, count
from circuitmill.training.parallel.layout import chunk
from circuitmill.training.parallel.memory import Memory, memory
from circuitmill.training.parallel.payload import Payload, Stored, payload

SMALL_WIRE = 64 * 2**20
"""Bytes per step up to which ranks share the batch whatever else sends less. Taken, not measured: so little is sent in
a moment, and ranks that share features wait for each other in the middle of every step too."""
DEAD_SHARE = 0.25
"""Of features that are taken to be dead at a time; what the auxiliary term needs grows with them."""
RESERVE = {"cuda": 2_000_000_000, "cpu": 500_000_000}
"""Of libraries and collectives: on a GPU the context and NCCL's buffers, else the interpreter and torch."""
SLACK = {"cuda": 0.05, "cpu": 0.7}
"""Share of memory that an allocator holds besides, in pieces. On a CPU the C library keeps what tensors below 32 MB
leave free: up to 0.67 in benchmarks/memory_plan.py."""


@dataclass(frozen=True)
class Situation:
    """What a plan depends on besides the configuration of the training."""

    device: Literal["cuda", "cpu"] = "cpu"
    stored: Stored | None = None
    """How activations come in; None is as float32."""
    pool_bytes: int = 0
    """Of host memory, over all ranks: tokens that are shuffled and those read ahead."""
    dead_share: float = DEAD_SHARE

    def of(self, cfg: TrainConfig, shape: Shape) -> Stored:
        """How activations come in."""
        sides = 1 if cfg.architecture.reproduces else 2
        return self.stored or Stored(sides * 4 * shape.n_layers * shape.d_model)


@dataclass(frozen=True)
class Estimate:
    """One strategy on so many ranks."""

    division: Division
    micro_batches: int
    limit: int
    """Memory of a rank."""
    impossible: str = ""
    """Why it cannot be had; then nothing else is known."""
    memory: Memory | None = None
    payload: Payload = field(default_factory=Payload)
    host: dict[str, int] = field(default_factory=dict)
    """Bytes of host memory besides; on a CPU they are of the same memory."""
    reserve: int = 0
    """What is added to the peak: for libraries, pieces that an allocator cannot use and, on a CPU, host memory."""

    @property
    def strategy(self) -> str:
        """Its name."""
        return self.division.strategy

    @property
    def feature_ranks(self) -> int:
        """Ranks that share the features of one copy."""
        return self.division.feature_ranks

    @property
    def total(self) -> int:
        """Memory that a rank must have, the reserve included."""
        return 0 if self.memory is None else self.memory.peak + self.reserve

    @property
    def fits(self) -> bool:
        """Whether it has that much."""
        return not self.impossible and self.total <= self.limit


def impossible(cfg: TrainConfig, strategy: str, ranks: int, feature_ranks: int = 0) -> str:
    """Why a strategy cannot be had; empty if it can.

    Args:
        cfg: Of the training.
        strategy: Any but auto.
        ranks: That train together.
        feature_ranks: With mesh: ranks that share the features of one copy; 0 if that is still open.
    """
    if strategy == "single":
        reason = f"{ranks} ranks" if ranks > 1 else ""
        return reason or _uneven(cfg, Division("single"))
    if ranks == 1:
        return "one rank"
    if cfg.batch_tokens % ranks:
        return f"batch_tokens {cfg.batch_tokens} is no multiple of {ranks} ranks"
    if strategy == "mesh" and not feature_ranks:
        found = [_impossible_mesh(cfg, ranks, one) for one in range(2, ranks) if ranks % one == 0]
        if not found:
            return f"{ranks} ranks cannot be divided into groups of several"
        return "" if "" in found else found[0]
    if strategy == "mesh":
        return _impossible_mesh(cfg, ranks, feature_ranks)
    if strategy == "features":
        return _indivisible(cfg, ranks) or _uneven(cfg, Division("features", ranks, ranks))
    if strategy == "fsdp":
        own = cfg.optimizer
        if own.name not in ("adam", "adamw"):
            return f"optimizer {own.name}"
        if own.precision in ("bf16", "fp16"):
            return f"precision {own.precision}"
        if own.by_rows:
            return "lazy" if own.lazy else f"moments {own.moments}"
    return _uneven(cfg, Division(strategy, ranks))


def _impossible_mesh(cfg: TrainConfig, ranks: int, feature_ranks: int) -> str:
    if ranks % feature_ranks:
        return f"{ranks} ranks are no multiple of feature_ranks {feature_ranks}"
    if not 1 < feature_ranks < ranks:
        return f"feature_ranks {feature_ranks} of {ranks} ranks: that is ddp or features"
    return _indivisible(cfg, feature_ranks) or _uneven(cfg, Division("mesh", ranks, feature_ranks))


def _uneven(cfg: TrainConfig, division: Division) -> str:
    parts, tokens = cfg.optimizer.micro_batches, cfg.batch_tokens // division.data_ranks
    return f"{tokens} tokens on a rank are no multiple of micro_batches {parts}" if tokens % parts else ""


def _indivisible(cfg: TrainConfig, feature_ranks: int) -> str:
    """Why features cannot be shared by so many ranks."""
    own, update = cfg.nonlinearity, cfg.optimizer
    if is_import_path(own.name):
        return f"nonlinearity {own.name}, which may look at all features"
    for kind in sorted(cfg.active_kinds()):
        if is_import_path(kind):
            return f"term {kind}, which may look at all features"
    if update.name in ("adam8bit", "muon"):
        return f"optimizer {update.name}"
    if update.precision == "fp16":
        return "precision fp16"
    if update.lazy:
        return "lazy, whose numbers by row are not in a checkpoint part by part"
    # the form decides, whatever the model's size
    reason = count(cfg, Shape(cfg.architecture.models, 1)).indivisible
    if reason:
        return reason
    if not chunk(cfg.n_features, feature_ranks - 1, feature_ranks).n_features:
        return f"n_features {cfg.n_features}: chunks of equal size leave some of {feature_ranks} ranks without any"
    if own.name == "groupmax":
        group, each = cfg.n_features // round(own.k), chunk(cfg.n_features, 0, feature_ranks).n_features
        if each % group:
            return f"groupmax: {each} features on a rank are no multiple of groups of {group}"
    return ""


def divisions(cfg: TrainConfig, ranks: int) -> Iterator[Division]:
    """All strategies on so many ranks, the simplest first; mesh by ranks that share features, fewest first."""
    for strategy in STRATEGIES:
        if strategy != "mesh":
            yield Division(strategy, ranks, ranks if strategy == "features" else 1)
            continue
        fixed = cfg.parallel.feature_ranks
        for sharing in [fixed] if fixed else [one for one in range(2, ranks) if ranks % one == 0] or [0]:
            yield Division(strategy, ranks, max(1, sharing))


def estimates(
    cfg: TrainConfig, shape: Shape, ranks: int, memory_bytes: int, situation: Situation | None = None
) -> list[Estimate]:
    """What every strategy needs.

    Args:
        cfg: Of the training; its own strategy does not matter, its `feature_ranks` does.
        shape: Of the activations.
        ranks: That train together.
        memory_bytes: Of a rank: of its GPU, or its share of the host's.
        situation: Where, and with what data; a CPU if not given.
    """
    situation = situation or Situation()
    census = count(cfg, shape, fsdp_ranks=[ranks])
    return [_estimate(cfg, shape, census, each, memory_bytes, situation) for each in divisions(cfg, ranks)]


def _estimate(
    cfg: TrainConfig, shape: Shape, census: Census, division: Division, limit: int, situation: Situation
) -> Estimate:
    parts = cfg.optimizer.micro_batches
    sharing = division.feature_ranks if division.strategy == "mesh" and division.feature_ranks > 1 else 0
    reason = impossible(cfg, division.strategy, division.ranks, sharing)
    if reason:
        return Estimate(division, parts, limit, reason)
    dead = situation.dead_share if "auxiliary" in cfg.active_kinds() else 0.0
    need = memory(cfg, shape, census, division, device=situation.device, dead=dead)
    stored = situation.of(cfg, shape)
    host = {"pools": situation.pool_bytes // division.ranks} if situation.pool_bytes else {}
    # what a rank writes is copied first; ranks with the same write a part each
    host["checkpoint"] = (need.weights + need.optimizer) // (1 if division.strategy == "fsdp" else division.data_ranks)
    here = sum(host.values()) if situation.device == "cpu" else 0
    reserve = RESERVE[situation.device] + round(SLACK[situation.device] * need.peak) + here
    sent = payload(cfg, shape, census, division, stored)
    return Estimate(division, parts, limit, memory=need, payload=sent, host=host, reserve=reserve)


def propose(
    cfg: TrainConfig, shape: Shape, ranks: int, memory_bytes: int, situation: Situation | None = None
) -> Estimate:
    """The strategy to take on so many ranks.

    Of those that fit: ddp if it sends little, else the one that sends least in a step with dead features; of equal ones
    the simplest. If none fits, the one that needs least, whose `fits` says so.

    Args:
        cfg: Of the training; its own strategy does not matter, its `feature_ranks` does.
        shape: Of the activations.
        ranks: That train together.
        memory_bytes: Of a rank: of its GPU, or its share of the host's.
        situation: Where, and with what data; a CPU if not given.

    Raises:
        ConfigError: none is possible.
    """
    found = estimates(cfg, shape, ranks, memory_bytes, situation)
    allowed = [each for each in found if not each.impossible]
    if not allowed:
        raise ConfigError(
            f"a training that {ranks} ranks can share",
            found="; ".join(f"{each.strategy}: {each.impossible}" for each in found),
            where="train.parallel.strategy",
            fix="choose another number of ranks, or other values of what is named",
        )
    fitting = [each for each in allowed if each.fits]
    if not fitting:
        return min(allowed, key=lambda each: each.total)
    if fitting[0].strategy == "ddp" and fitting[0].payload.most <= SMALL_WIRE:
        return fitting[0]
    return min(fitting, key=lambda each: each.payload.most)
