"""Ranks and devices: the only module that reads the variables a launcher sets.

A process that torchrun did not start is rank 0 of 1 and never initialises torch.distributed.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that work on the same stage."""

    rank: int
    size: int
    local_rank: int

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def current() -> Ranks:
    """This process's place, from the launcher's variables."""
    env = os.environ
    return Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def device() -> torch.device:
    """The accelerator of this rank, or the CPU where there is none."""
    return torch.device("cuda", current().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def init() -> Ranks:
    """Join the process group if there is more than one rank; call once per process.

    Returns:
        This process's place.
    """
    ranks = current()
    if ranks.size > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return ranks


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
