"""Which ranks share the tokens of a batch and which the features of each source.

| strategy | tokens of a batch | features |
|---|---|---|
| single | one rank | one rank |
| ddp, fsdp | W ranks | all on every rank; fsdp divides parameters by rows between steps |
| features | all on every rank | W ranks |
| mesh | D groups of ranks | the K ranks of a group; W = D K, rank = group * K + place in the group |

Features are cut into chunks of ceil(n_features / K), the last ones smaller.
"""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from circuitmill.config.parallel import ParallelConfig
from circuitmill.core.parts import WHOLE, Parts, Shard
from circuitmill.distributed import Ranks
from circuitmill.errors import ConfigError
from circuitmill.training.parallel.collectives import Group, Wire
from circuitmill.training.parallel.shards import CPU, Shards

_BACKGROUND = timedelta(hours=2)
"""Longer than it takes to write a checkpoint."""
_WIRES = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """This rank's place among those that train together."""

    strategy: str
    ranks: Ranks
    shard: Shard
    """Features of each source that are here."""
    world: Group = field(default_factory=Group)
    data: Group = field(default_factory=Group)
    """Ranks with the same features and other tokens."""
    features: Group = field(default_factory=Group)
    """Ranks with the same tokens and other features."""
    mesh: DeviceMesh | None = None
    """Axes data and features; None with one rank."""
    background: dist.ProcessGroup | None = None
    """All ranks, on the CPU, for what goes on beside the training; None with one rank."""
    device: torch.device = CPU
    wire: torch.dtype | None = None
    overlap: bool = False

    def training(self, *, ragged: bool = False) -> Parts:
        """Where the rest of a batch is while training.

        Args:
            ragged: Whether ranks may have unequal numbers of tokens.
        """
        if self.features.size == self.data.size == 1:
            return WHOLE
        return Shards(
            self.shard,
            self.features,
            self.data,
            wire=self.wire,
            overlap=self.overlap,
            device=self.device,
            ragged=ragged,
        )

    @property
    def wire_bytes(self) -> int:
        """What this rank has handed to collectives so far."""
        return self.world.wire.n_bytes

    @property
    def measuring(self) -> Parts:
        """The same for tokens that all ranks have."""
        return WHOLE if self.features.size == 1 else Shards(self.shard, self.features)

    @property
    def measures(self) -> bool:
        """Whether this rank takes part in measurements: ranks with all features leave them to the first."""
        return self.ranks.first or self.features.size > 1

    def rows(self, batch_tokens: int) -> slice:
        """The rows of a batch that this rank reads; those of ranks that share features make up what they work on.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        return rows_of(batch_tokens, self.ranks)


def rows_of(batch_tokens: int, ranks: Ranks) -> slice:
    """As `Layout.rows`, before there is a layout.

    >>> rows_of(8, Ranks(rank=1, size=2, local_rank=1))
    slice(4, 8, None)

    Raises:
        ConfigError: the batch cannot be shared equally.
    """
    if batch_tokens % ranks.size:
        raise ConfigError(
            f"a multiple of the number of ranks ({ranks.size})",
            found=batch_tokens,
            where="train.batch_tokens",
            fix="choose a batch that the ranks can share equally",
        )
    share = batch_tokens // ranks.size
    return slice(ranks.rank * share, (ranks.rank + 1) * share)


def chunk(n_features: int, index: int, size: int) -> Shard:
    """The features of one of several ranks.

    >>> [chunk(10, index, 4).n_features for index in range(4)]
    [3, 3, 3, 1]
    """
    per_rank = -(-n_features // size)
    return Shard(min(index * per_rank, n_features), min((index + 1) * per_rank, n_features), n_features)


def alone(n_features: int) -> Layout:
    """One rank."""
    return Layout("single", Ranks(rank=0, size=1, local_rank=0), Shard(0, n_features, n_features))


def arrange(
    own: ParallelConfig, n_features: int, ranks: Ranks, *, strategy: str, feature_ranks: int, device: torch.device
) -> Layout:
    """The layout of a strategy; makes the groups, so that all ranks must come here.

    Args:
        own: How partial sums travel.
        n_features: Per source.
        ranks: All that train together.
        strategy: Any but auto.
        feature_ranks: With mesh: ranks that share features.
        device: Of this rank.
    """
    if ranks.size == 1:
        return replace(alone(n_features), ranks=ranks, device=device)
    sharing = {"features": ranks.size, "mesh": feature_ranks}.get(strategy, 1)
    mesh = init_device_mesh(device.type, (ranks.size // sharing, sharing), mesh_dim_names=("data", "features"))
    wire = Wire()
    background: Any = dist.new_group(backend="gloo", timeout=_BACKGROUND)
    index, place = divmod(ranks.rank, sharing)
    return Layout(
        strategy,
        ranks,
        chunk(n_features, place, sharing),
        world=Group(ranks.rank, ranks.size, None, wire),
        data=Group(index, ranks.size // sharing, mesh.get_group("data"), wire),
        features=Group(place, sharing, mesh.get_group("features"), wire),
        mesh=mesh,
        background=background,
        device=device,
        wire=_WIRES[own.wire],
        overlap=own.overlap,
    )
