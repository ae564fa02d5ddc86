"""One rank of a group, or a process that never heard of a group: what it finds goes into a file.

python -m tests.distributed.ranks FOLDER [wrong] [gpu]        (torchrun's variables decide about the group)

With `wrong` the sum over shards sums its gradient too, as it must not. With `gpu` all ranks work on the first GPU, and
what they send goes through gloo, because NCCL wants a GPU for each.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.cases import CASES, CPU, STRATEGIES, arranged, curve, one_step, tried

from circuitmill import distributed
from circuitmill.stores.tensors import write_tensors
from circuitmill.training.parallel import shards

CURVES = {
    1: ("jumprelu", "topk", "batch_topk_all", "matryoshka"),
    2: ("jumprelu", "topk", "batch_topk_all", "matryoshka"),
    4: ("jumprelu", "batch_topk_all"),
}
"""Trained for 200 steps, by number of ranks: four on few processors take their time."""


def main(folder: Path, *, wrong: bool, gpu: bool) -> None:
    """All cases with all strategies that make sense for so many ranks."""
    ranks, device = distributed.current(), torch.device("cuda", 0) if gpu else CPU
    if gpu and ranks.size > 1:
        dist.init_process_group("gloo")
    else:
        distributed.init()
    assert dist.is_initialized() == (ranks.size > 1)
    if wrong:
        shards._Total.backward = staticmethod(_summed)
    found: dict[str, torch.Tensor] = {}
    for strategy in ["features"] if wrong else (STRATEGIES if ranks.size > 1 else ["single"]):
        for case, cfg in CASES.items():
            if tried(strategy, ranks.size, case):
                # torch.distributed does not take groups back, and all cases have the same number of features
                layout = arranged(strategy, cfg, ranks, device)
                found |= {f"{strategy}/{case}/{name}": value for name, value in one_step(cfg, layout).items()}
                if case in CURVES.get(ranks.size, ()) and not wrong and strategy != "overlap":
                    found |= {f"{strategy}/{case}/curve.{name}": value for name, value in curve(cfg, layout).items()}
    write_tensors(folder / f"{ranks.rank}.safetensors", found)
    distributed.shutdown()


def _summed(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient, None, None


if __name__ == "__main__":
    main(Path(sys.argv[1]), wrong="wrong" in sys.argv[2:], gpu="gpu" in sys.argv[2:])
