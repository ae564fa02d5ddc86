"""The layout that a configuration names, or the one that the memory of these ranks suggests."""

import logging
from pathlib import Path

import torch

from circuitmill import distributed
from circuitmill.config.train import TrainConfig
from circuitmill.distributed import Ranks
from circuitmill.errors import ConfigError
from circuitmill.training.parallel.census import Shape
from circuitmill.training.parallel.collectives import Group
from circuitmill.training.parallel.layout import Layout, arrange, rows_of
from circuitmill.training.parallel.plan import Estimate, Situation, estimates, impossible, propose

_log = logging.getLogger(__name__)


def choose(
    cfg: TrainConfig, shape: Shape, ranks: Ranks, *, device: torch.device, situation: Situation
) -> tuple[Layout, Estimate]:
    """Arrange the ranks as `train.parallel` says, and what that is expected to need; all ranks must come here.

    Args:
        cfg: Of the training.
        shape: Of the activations.
        ranks: That train together.
        device: Of this rank.
        situation: The device and the data.

    Raises:
        ConfigError: the strategy is not possible with this configuration on so many ranks.
    """
    rows_of(cfg.batch_tokens, ranks)
    here = torch.tensor(memory_of(device), device=device)
    least = int(Group(ranks.rank, ranks.size).gather(here).min())
    estimate = decide(cfg, shape, ranks.size, least, situation)
    _log.info(
        "%d rank%s, strategy %s%s: %.2f GB planned on each",
        ranks.size,
        "s" * (ranks.size > 1),
        estimate.strategy,
        f" with {estimate.feature_ranks} ranks to a copy" if estimate.strategy == "mesh" else "",
        estimate.total / 1e9,
    )
    if not estimate.fits:
        _log.warning("%.2f GB planned, %.2f GB there", estimate.total / 1e9, estimate.limit / 1e9)
    layout = arrange(
        cfg.parallel,
        cfg.n_features,
        ranks,
        strategy=estimate.strategy,
        feature_ranks=estimate.feature_ranks,
        device=device,
    )
    return layout, estimate


def decide(cfg: TrainConfig, shape: Shape, ranks: int, memory: int, situation: Situation) -> Estimate:
    """The strategy that is named, or the proposal; one rank shares nothing, whatever is named.

    Args:
        cfg: Of the training.
        shape: Of the activations.
        ranks: That train together.
        memory: Bytes that the rank with least can have.
        situation: The device and the data.

    Raises:
        ConfigError: the strategy is not possible with this configuration on so many ranks.
    """
    own = cfg.parallel
    if own.strategy == "auto" or ranks == 1:
        return propose(cfg, shape, ranks, memory, situation)
    reason = impossible(cfg, own.strategy, ranks, own.feature_ranks)
    if reason:
        raise ConfigError(
            f"a training that {ranks} ranks can share by strategy {own.strategy}",
            found=reason,
            where="train.parallel.strategy",
            fix="set train.parallel.strategy=auto, or change what is named; `circuitmill plan` says what is possible",
        )
    found = [each for each in estimates(cfg, shape, ranks, memory, situation) if each.strategy == own.strategy]
    possible = [each for each in found if not each.impossible]
    return next((each for each in possible if each.fits), min(possible, key=lambda each: each.total))


def memory_of(device: torch.device) -> int:
    """Bytes that a rank can have: of its GPU, or its share of what processes on the host can get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    # free pages would not do: what the kernel keeps of files is given to whoever asks
    figures = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(figures["MemAvailable"].split()[0]) * 1024 // distributed.local_size()
