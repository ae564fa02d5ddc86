"""How much faster are two ranks on twice the work than one rank on its half?

    python -m benchmarks.weak_scaling [--rounds 7] [--batch-tokens 4096] [--kind jumprelu] [--way features]

Two processes of one thread each, on activations in memory, 6 layers x 4,096 features, d_model 256. What is compared:

| way | features | tokens | processes |
|---|---|---|---|
| one | the first half | a batch | one; the other waits |
| apart | each its half | the same batch each | two, which send nothing: what memory and caches of the machine allow |
| features, overlap, bf16 | all, each its half | a batch | two |
| ddp | the first half, both | two batches, each one | two |

So every process has the same products to make in all of them. Efficiency is the time of a step of `one` by that of the
way; of tokens per second it is the ratio to `one`, by the number of times the work is greater. Every way is measured
between two stretches of `one`, in rounds; medians and quartiles over rounds. Learning rates are next to nothing, so
that as many features fire in all steps. One JSON line per kind and way, with the same by processor time, which other
work on the machine disturbs less.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from circuitmill import distributed
from circuitmill.config.decode import decode
from circuitmill.config.parallel import ParallelConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig, TrainConfig
from circuitmill.core.codecs import StoredBatch, plain_batch
from circuitmill.core.parts import Shard
from circuitmill.core.scaling import Scaling
from circuitmill.errors import InterruptedRun
from circuitmill.training.batches import Batches
from circuitmill.training.loop import train
from circuitmill.training.parallel.cut import cut
from circuitmill.training.parallel.layout import Layout, alone, arrange
from circuitmill.training.state import TrainState, make_state, start

N_LAYERS, D_MODEL, N_FEATURES, L0 = 6, 256, 4096, 16
HALF = N_FEATURES // 2
KINDS = ("jumprelu", "dead", "batch_topk", "topk")
"""`dead` is jumprelu with an eighth of the features dead."""
WAYS = ("apart", "features", "overlap", "bf16", "ddp")
WARM_UP = 2
CPU = torch.device("cpu")
FOREVER = 10**15
"""Tokens."""


def configured(kind: str, batch_tokens: int) -> TrainConfig:
    """Of the whole."""
    options = Path(__file__).parents[1] / "config" / "train" / "default.yaml"
    cfg = decode(TrainConfig, yaml.safe_load(options.read_text()), "train")
    ranked = kind in ("batch_topk", "topk")
    loss = dict(cfg.loss) | {"tanh_sparsity": TermConfig(0.0 if ranked else 0.8, scale=1.0)}
    if ranked:
        loss["pre_activation"] = TermConfig(0.0)
    return replace(
        cfg,
        n_features=N_FEATURES,
        batch_tokens=batch_tokens,
        pool_tokens=batch_tokens,
        tokens=FOREVER,
        checkpoint_tokens=FOREVER,
        dead_tokens=FOREVER // 2,
        warmup_tokens=0,
        lr=1e-12,
        loss=loss,
        init=replace(cfg.init, l0=float(L0)),
        nonlinearity=NonlinearityConfig(kind, k=float(L0)) if ranked else cfg.nonlinearity,
        monitor=replace(cfg.monitor, heldout_tokens=0, behaviour_tokens=0),
        wandb=False,
    )


def of_half(cfg: TrainConfig) -> TrainConfig:
    """Half of the features, of which half as many fire."""
    own = cfg.nonlinearity
    return replace(cfg, n_features=HALF, nonlinearity=replace(own, k=own.k / 2) if own.k else own)


class Memory:
    """The same rows for every step, which are there from the beginning."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.stored = plain_batch(x, y)

    def batch(self, index: int) -> StoredBatch:
        """As the trainer asks for them."""
        return self.stored


@dataclass
class Training:
    """One that can be taken up again and again."""

    cfg: TrainConfig
    layout: Layout
    state: TrainState
    data: Batches

    def go_on(self, steps: int) -> None:
        """As many steps more, with all that the trainer does besides."""
        until = self.state.step + steps
        hooks: dict[str, Any] = {"log": lambda row: None, "checkpoint": lambda state, l0=None: None}
        hooks |= {"advance": lambda tokens: None, "stop": lambda: self.state.step + 1 >= until}
        with suppress(InterruptedRun):
            train(self.cfg, self.state, self.data, layout=self.layout, **hooks)


def trainings(kind: str, batch_tokens: int, stack: ExitStack) -> dict[str, Training]:
    """All ways, in this process, with the same numbers in the features that they have in common."""
    whole, ranks = configured(kind, batch_tokens), distributed.current()
    x, y = rows(batch_tokens, seed=0)

    def arranged(name: str, n_features: int) -> Layout:
        own: Any = ParallelConfig(strategy=name)  # type: ignore[arg-type]
        return arrange(own, n_features, ranks, strategy=name, feature_ranks=0, device=CPU)

    def made(cfg: TrainConfig, layout: Layout, shard: Shard, mine: slice) -> Training:
        source = Memory(x[mine].clone(), y[mine].clone())
        ones = torch.ones(N_LAYERS)
        scaling = Scaling.by_layer(ones, ones, D_MODEL)
        data = stack.enter_context(Batches(source, scaling, device=CPU, together=layout.features))
        everything = start(whole, x, y).transcoder
        if kind == "dead":
            with torch.no_grad():
                everything.b_enc[:, ::8] -= 10.0
        state = make_state(cfg, cut(everything, shard), layout)
        if kind == "dead":
            state.idle[:, (-shard.first) % 8 :: 8] = FOREVER
        return Training(cfg, layout, state, data)

    half, both = of_half(whole), slice(0, batch_tokens)
    single = alone(HALF)
    together = arranged("features", N_FEATURES)
    found = {
        "one": made(half, single, Shard(0, HALF, N_FEATURES), both),
        "features": made(whole, together, together.shard, together.rows(batch_tokens)),
        "ddp": made(
            replace(half, batch_tokens=2 * batch_tokens, pool_tokens=2 * batch_tokens),
            arranged("ddp", HALF),
            Shard(0, HALF, N_FEATURES),
            both,
        ),
    }
    # rank 1 has another half, the same work
    found["apart"] = found["one"] if ranks.first else made(half, single, together.shard, both)
    found["overlap"] = replace(found["features"], layout=replace(together, overlap=True))
    found["bf16"] = replace(found["features"], layout=replace(together, wire=torch.bfloat16))
    return found


def rows(n_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n_tokens, N_LAYERS, D_MODEL, generator=generator) for _ in range(2))
    return x, y


def measure(kind: str, ways: list[str], arguments: argparse.Namespace) -> None:
    """All ranks come here; the first one prints."""
    with ExitStack() as stack:
        found = trainings(kind, arguments.batch_tokens, stack)
        ranks, world = distributed.current(), found["features"].layout.world

        def timed(way: str, steps: int) -> tuple[float, float]:
            """Wall time of a step on the rank that needed longest, and processor time on the average rank."""
            world.wait()
            wall, own = time.perf_counter(), time.process_time()
            if way != "one" or ranks.first:
                found[way].go_on(steps)
            spent = torch.tensor([time.perf_counter() - wall, time.process_time() - own], dtype=torch.float64)
            by_rank = world.gather(spent)[: 1 if way == "one" else None] / steps
            return by_rank[:, 0].max().item(), by_rank[:, 1].mean().item()

        for way in ("one", *ways):
            timed(way, WARM_UP)
        results = defaultdict(list)
        for _ in range(arguments.rounds):
            before = timed("one", arguments.steps)
            for way in ways:
                this = timed(way, arguments.steps)
                after = timed("one", arguments.steps)
                alone_now = [(first + second) / 2 for first, second in zip(before, after, strict=True)]
                before = after
                results[way].append((*this, *alone_now))
        sent = {way: wire_bytes(found[way]) for way in ways}
    if ranks.first:
        report(kind, results, sent, arguments)


def wire_bytes(training: Training) -> int:
    """Handed to collectives in one step."""
    before = training.layout.wire_bytes
    training.go_on(1)
    # of the counter of dead features, with which every training begins
    return training.layout.wire_bytes - before - 8 * (training.layout.features.size > 1)


def report(kind: str, results: dict, sent: dict[str, int], arguments: argparse.Namespace) -> None:
    """Medians and quartiles over rounds."""
    limit = statistics.median(one / this for this, _, one, _ in results["apart"]) if "apart" in results else None
    for way, rounds in results.items():
        by_wall = [one / this for this, _, one, _ in rounds]
        by_cpu = [one / this for _, this, _, one in rounds]
        tokens = arguments.batch_tokens * (2 if way in ("apart", "ddp") else 1)
        line = {
            "kind": kind,
            "way": way,
            "batch_tokens": tokens,
            "tokens_per_second": round(tokens / statistics.median(this for this, *_ in rounds)),
            "one_tokens_per_second": round(arguments.batch_tokens / statistics.median(one for *_, one, _ in rounds)),
            "efficiency": spread(by_wall),
            "of_the_machine's": None if limit is None else round(statistics.median(by_wall) / limit, 3),
            "efficiency_by_processor_time": spread(by_cpu),
            "wire_bytes": sent[way],
            "rounds": len(rounds),
            "load": [round(load, 1) for load in os.getloadavg()],
        }
        print(json.dumps(line), flush=True)


def spread(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, 3) for value in (middle, low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each way in a round")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=["jumprelu", "batch_topk"])
    parser.add_argument("--way", choices=WAYS, nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        distributed.init()
        for kind in arguments.kind:
            measure(kind, arguments.way, arguments)
        distributed.shutdown()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in both]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")


if __name__ == "__main__":
    main()
