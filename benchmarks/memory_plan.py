"""How much memory does a rank need, against what `circuitmill plan` says?

    python -m benchmarks.memory_plan [--shape 4x256x8192] [--strategy ddp]

Trains some steps in processes of their own, on activations in memory, one thread a rank. Measured is the largest
resident memory of a rank, less what it had before the training state was built, when libraries were imported, had made
a small training, and the data were there. One JSON line per shape and strategy, of the rank that needed most: planned
and measured bytes and their ratio, what is planned for when more features fire than at the start, and bytes handed to
collectives in all steps, planned and counted.

The C library keeps freed memory of tensors below 32 MB for later. That is left out by having it give back everything
(MALLOC_MMAP_THRESHOLD_); `--keep` leaves it in.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from circuitmill import distributed
from circuitmill.config.decode import decode
from circuitmill.config.parallel import ParallelConfig
from circuitmill.config.train import TermConfig, TrainConfig
from circuitmill.core.codecs import StoredBatch, plain_batch
from circuitmill.core.scaling import Scaling
from circuitmill.training.batches import Batches
from circuitmill.training.loop import train
from circuitmill.training.parallel.census import Shape, count
from circuitmill.training.parallel.layout import alone, arrange
from circuitmill.training.parallel.memory import memory
from circuitmill.training.parallel.plan import Situation, estimates
from circuitmill.training.state import start

CASES = {"4x256x8192": 2048, "6x256x4096": 4096, "3x512x6144": 1024}
"""Layers x width x features per layer, and tokens of a batch."""
STRATEGIES = {"single": 1, "ddp": 2, "features": 2, "fsdp": 2}
STEPS = 4


def configured(case: str, strategy: str, **changes: Any) -> tuple[TrainConfig, Shape]:
    """The demo's training at another size, without the auxiliary term: nothing dies in so few steps.

    It hardly learns, so that as many features fire as at the start, and what is planned for these can be compared.
    """
    layers, width, n_features = map(int, case.split("x"))
    options = Path(__file__).parents[1] / "config" / "train" / "default.yaml"
    cfg = decode(TrainConfig, yaml.safe_load(options.read_text()), "train")
    batch = CASES.get(case, 1024)
    loss = {name: term for name, term in cfg.loss.items() if name != "auxiliary"}
    cfg = replace(
        cfg,
        n_features=n_features,
        batch_tokens=batch,
        tokens=STEPS * batch,
        pool_tokens=batch,
        warmup_tokens=0,
        lr=1e-7,
        loss=loss | {"tanh_sparsity": TermConfig(1.0, scale=1.0)},
        init=replace(cfg.init, l0=16.0),
        monitor=replace(cfg.monitor, log_tokens=STEPS * batch, heldout_tokens=0, behaviour_tokens=0),
        checkpoint_tokens=STEPS * batch,
        parallel=ParallelConfig(strategy),  # type: ignore[arg-type]
        **changes,
    )
    return cfg, Shape(layers, width)


class Memory:
    """The same rows for every step, which are there from the beginning."""

    def __init__(self, shape: Shape, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(rows, shape.n_layers, shape.d_model, generator=generator) for _ in range(2))

    def batch(self, index: int) -> StoredBatch:
        """This rank's rows."""
        return plain_batch(self.x, self.y)


def status(key: str) -> int:
    """Bytes that the kernel gives for this process."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def measure(cfg: TrainConfig, shape: Shape) -> dict[str, float]:
    """Train in this process; it may be one of several ranks."""
    torch.set_num_threads(1)
    ranks = distributed.init()
    own = cfg.parallel
    layout = arrange(
        own,
        cfg.n_features,
        ranks,
        strategy=own.strategy,
        feature_ranks=own.feature_ranks,
        device=torch.device("cpu"),
    )
    ones = torch.ones(shape.n_layers)
    rows = layout.rows(cfg.batch_tokens)
    source = Memory(shape, rows.stop - rows.start)
    rest: dict[str, Any] = {
        "log": lambda row: None,
        "checkpoint": lambda state, l0=None: None,
        "advance": lambda tokens: None,
        "stop": lambda: False,
    }
    _warm_up(cfg)
    with Batches(
        source,
        Scaling.by_layer(ones, ones, shape.d_model),
        device=torch.device("cpu"),
        together=layout.features,
    ) as data:
        layout.world.wait()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        state = start(cfg, *(layout.data.gather_rows(side) for side in data.get(0)), layout)
        begun = layout.wire_bytes
        train(cfg, state, data, layout=layout, **rest)
        sent = layout.wire_bytes - begun
        peak = status("VmHWM")
        # of the counters of dead features, once, and of the one row of metrics
        return {"rank": ranks.rank, "measured": peak - before, "sent": sent}


def _warm_up(cfg: TrainConfig) -> None:
    """The same at a small size, alone."""
    small = replace(
        cfg,
        n_features=64,
        batch_tokens=64,
        pool_tokens=64,
        tokens=128,
        checkpoint_tokens=128,
        init=replace(cfg.init, l0=4.0),
    )
    ones, shape = torch.ones(2), Shape(2, 32)
    hooks: dict[str, Any] = {"log": lambda row: None, "checkpoint": lambda state, l0=None: None}
    hooks |= {"advance": lambda tokens: None, "stop": lambda: False}
    with Batches(Memory(shape, 64), Scaling.by_layer(ones, ones, 32), device=torch.device("cpu")) as data:
        train(small, start(small, *data.get(0)), data, layout=alone(64), **hooks)


def planned(cfg: TrainConfig, shape: Shape, n_ranks: int) -> dict[str, Any]:
    """What the planner says of the same."""
    found = estimates(cfg, shape, n_ranks, 1 << 40, Situation(dead_share=0.0))
    (one,) = [each for each in found if each.strategy == cfg.parallel.strategy]
    if one.memory is None:
        raise SystemExit(one.impossible)
    census, sent = count(cfg, shape, [n_ranks]), one.payload
    need = memory(cfg, shape, census, one.division, device="cpu", dead=0.0, grows=False)
    return {
        "planned": need.peak,
        "planned_later": one.memory.peak,
        "moment": need.moment,
        "moments": need.moments,
        "kept_share": round(need.share, 4),
        "planned_sent": STEPS * sum(sent.step.values()) + sum(sent.row.values()) + 8 * (one.feature_ranks > 1),
    }


def run(case: str, strategy: str, n_ranks: int, *, keep: bool) -> dict[str, Any]:
    """All ranks of one case, each a process."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = []
        for rank in range(n_ranks):
            threshold = {} if keep else {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
            own = threshold | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            }
            out = Path(folder) / f"{rank}.json"
            command = [sys.executable, __file__, "--shape", case, "--strategy", strategy, "--as-rank", str(out)]
            ranks.append(subprocess.Popen(command, env=os.environ | common | own))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"{case} {strategy}: exit codes {codes}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n_ranks)]
    worst = max(found, key=lambda each: each["measured"])
    cfg, shape = configured(case, strategy)
    plan = planned(cfg, shape, n_ranks)
    ratio = round(plan["planned"] / worst["measured"], 3)
    return {"shape": case, "strategy": strategy, "ranks": n_ranks, "ratio": ratio, **plan, **worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(CASES))
    parser.add_argument("--strategy", choices=list(STRATEGIES))
    parser.add_argument("--keep", action="store_true", help="leave in what the C library keeps")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank is not None:
        found = measure(*configured(arguments.shape, arguments.strategy))
        arguments.as_rank.write_text(json.dumps(found))
        distributed.shutdown()
        return
    for case in [arguments.shape] if arguments.shape else CASES:
        for strategy in [arguments.strategy] if arguments.strategy else STRATEGIES:
            print(json.dumps(run(case, strategy, STRATEGIES[strategy], keep=arguments.keep)), flush=True)


if __name__ == "__main__":
    main()
