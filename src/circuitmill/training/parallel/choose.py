"""The layout that a configuration names, or the one that the memory of these ranks suggests."""

import logging
import os

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
    estimate = _estimate(cfg, shape, ranks, device, situation)
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


def _estimate(cfg: TrainConfig, shape: Shape, ranks: Ranks, device: torch.device, situation: Situation) -> Estimate:
    own = cfg.parallel
    memory = int(Group(ranks.rank, ranks.size).gather(torch.tensor(memory_of(device), device=device)).min())
    # one rank has every strategy, and shares nothing
    if own.strategy == "auto" or (ranks.size == 1 and own.strategy != "single"):
        return propose(cfg, shape, ranks.size, memory, situation)
    reason = impossible(cfg, own.strategy, ranks.size, own.feature_ranks)
    if reason:
        raise ConfigError(
            f"a training that {ranks.size} ranks can share by strategy {own.strategy}",
            found=reason,
            where="train.parallel.strategy",
            fix="set train.parallel.strategy=auto, or change what is named; `circuitmill plan` says what is possible",
        )
    found = [each for each in estimates(cfg, shape, ranks.size, memory, situation) if each.strategy == own.strategy]
    possible = [each for each in found if not each.impossible]
    return next((each for each in possible if each.fits), min(possible, key=lambda each: each.total))


def memory_of(device: torch.device) -> int:
    """Bytes that a rank can have: of its GPU, or of what the host has free, shared with the other ranks there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.local_size()
