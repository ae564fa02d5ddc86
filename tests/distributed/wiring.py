"""A rank that counts what it sends in every step of many small trainings.

python -m tests.distributed.wiring FOLDER MODEL        (a launcher's variables decide about the group)

It writes `FOLDER/<rank>.json`: for every training a list of steps, each with the bytes that `Group` counted, all
collectives that torch was asked for and the bytes they were given, features that were dead, and whether a row of
metrics was made.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.distributed.cases import BATCH, CASES, MATRYOSHKA
from tests.training.helpers import D_MODEL, N_LAYERS, Memory, batches, beginning, scaling
from torch.utils._python_dispatch import TorchDispatchMode

from circuitmill import distributed
from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.model import ModelConfig
from circuitmill.config.parallel import ParallelConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig, TrainConfig
from circuitmill.core import init
from circuitmill.core.codecs import Channels, Encoded, StoredBatch, make_codec
from circuitmill.core.scaling import Scaling
from circuitmill.core.transcoder import Transcoder
from circuitmill.lm.end_to_end import EndToEnd
from circuitmill.lm.load import load_language_model
from circuitmill.training import loop
from circuitmill.training.finetune import state_from_base
from circuitmill.training.parallel import layout as layouts
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.parallel.payload import Stored
from circuitmill.training.sequences import SequenceBatches
from circuitmill.training.state import TrainState, start

N_STEPS = 4
GROUP_CHANNELS = 3
CONTEXT, WIDTH = 8, 16
"""Of sequences, and of the language model."""
WIRINGS: dict[int, dict[str, ParallelConfig]] = {
    2: {
        "ddp": ParallelConfig("ddp"),
        "fsdp": ParallelConfig("fsdp"),
        "features": ParallelConfig("features"),
        "overlap": ParallelConfig("features", overlap=True),
        "bf16": ParallelConfig("features", wire="bf16"),
    },
    4: {
        "mesh": ParallelConfig("mesh", feature_ranks=2),
        "mesh_bf16": ParallelConfig("mesh", feature_ranks=2, wire="bf16", overlap=True),
    },
}
"""By number of ranks."""


@dataclass(frozen=True)
class Training:
    """How much is sent depends on this."""

    cfg: TrainConfig
    data: str = "float32"
    """How activations come in; a row of `DATA`."""

    def under(self, own: ParallelConfig) -> TrainConfig:
        """With a strategy; short, and with a row of metrics after every other step."""
        monitor = replace(self.cfg.monitor, log_tokens=2 * BATCH)
        return replace(
            self.cfg,
            parallel=own,
            monitor=monitor,
            tokens=N_STEPS * BATCH,
            checkpoint_tokens=N_STEPS * BATCH,
            warmup_tokens=0,
        )

    @property
    def d_model(self) -> int:
        """Width of what is read."""
        return WIDTH if self.cfg.end_to_end else D_MODEL


class _Int8(Memory):
    def batch(self, index: int) -> StoredBatch:
        codec, constants = make_codec("int8", N_LAYERS, D_MODEL, GROUP_CHANNELS), Channels.neutral(N_LAYERS, D_MODEL)
        sides = [codec.encode(side[self.rows].contiguous(), constants) for side in self.pair(index)]
        return StoredBatch(*(Encoded(codec, constants, side) for side in sides))


class _Inputs(Memory):
    def batch(self, index: int) -> StoredBatch:
        return StoredBatch(super().batch(index).inputs, None)


FULL = N_LAYERS * D_MODEL
DATA: dict[str, tuple[type[Memory], dict[str, Any], Stored]] = {
    "float32": (Memory, {}, Stored(2 * 4 * FULL)),
    "int8": (_Int8, {}, Stored(2 * (FULL + FULL // GROUP_CHANNELS))),
    "recomputed": (_Inputs, {"targets": torch.relu}, Stored(4 * FULL, recomputed=True)),
}
"""Source of a rank's rows, options of `Batches`, and what the planner is told."""
_FALLING = NonlinearityConfig("topk", k=4.0, k_start=7.0, k_ramp_share=0.75, calibration_tokens=64)


_THROUGH = {"kl": TermConfig(0.5), "cross_entropy": TermConfig(0.2)}
_BALANCED = {"kl": TermConfig(0.5, balance=True)}


def _changed(case: str, **changes: Any) -> Training:
    own = {key.removeprefix("optimizer__"): changes.pop(key) for key in list(changes) if key.startswith("optimizer__")}
    cfg = replace(CASES[case], **changes)
    return Training(replace(cfg, optimizer=replace(cfg.optimizer, **own)))


TRAININGS: dict[str, Training] = {
    **{case: Training(cfg) for case, cfg in CASES.items()},
    "int8": Training(CASES["jumprelu"], "int8"),
    "recomputed": Training(CASES["jumprelu"], "recomputed"),
    "micro_batch_topk": _changed("batch_topk", optimizer__micro_batches=2),
    "micro_penalties": _changed("penalties", optimizer__micro_batches=3),
    "micro_low_rank": _changed("low_rank", optimizer__micro_batches=2),
    "falling_k": _changed("topk", nonlinearity=_FALLING),
    "bf16_weights": _changed("low_rank", optimizer__precision="bf16"),
    "bf16_products": _changed("matryoshka", optimizer__precision="bf16_autocast"),
    "acausal": _changed("jumprelu", architecture=ArchitectureConfig(topology="acausal")),
    "source_tied": _changed("jumprelu", architecture=ArchitectureConfig(decoder="source", pair_scale=True)),
    "without_auxiliary": _changed("batch_topk", loss={"reconstruction": TermConfig(1.0)}, architecture=MATRYOSHKA),
    "two_auxiliary": _changed(
        "jumprelu", loss=CASES["jumprelu"].loss | {"more": TermConfig(0.1, k=2, term="auxiliary")}
    ),
    "adapter": _changed("jumprelu", base="main", adapter_rank=2),
    "end_to_end": _changed("jumprelu", loss=CASES["jumprelu"].loss | _THROUGH),
    "end_to_end_topk": _changed("topk", loss=CASES["topk"].loss | _THROUGH),
    "balanced": _changed("jumprelu", loss=CASES["jumprelu"].loss | _BALANCED, optimizer__micro_batches=3),
    "end_to_end_micro": _changed("batch_topk", loss=CASES["topk"].loss | _THROUGH, optimizer__micro_batches=3),
}


def possible(training: Training, own: ParallelConfig) -> bool:
    """fully_shard and parameters in bfloat16 do not go together."""
    return own.strategy != "fsdp" or training.cfg.optimizer.precision != "bf16"


class Sent(TorchDispatchMode):
    """Every collective, as torch is asked for it: beneath `Group` and whatever else sends."""

    GIVEN: dict[str, Callable[[tuple], list[torch.Tensor]]] = {  # noqa: RUF012
        "allreduce_": lambda args: args[0],
        "broadcast_": lambda args: args[0],
        "_allgather_base_": lambda args: [args[1]],
        "_reduce_scatter_base_": lambda args: [args[1]],
    }
    """Where the tensors are that go in; what is not here is not expected in a training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note it and go on."""
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            # what another rank spreads is sent there
            if name != "broadcast_" or dist.ProcessGroup.unbox(args[1]).rank() == args[2]:
                self.calls.append((name, sum(tensor.nbytes for tensor in self.GIVEN[name](args))))
        return func(*args, **(kwargs or {}))

    def taken(self) -> list[tuple[str, int]]:
        """Since it was last asked."""
        calls, self.calls = self.calls, []
        return calls


@contextmanager
def _begun(training: Training, layout: Layout, model: Path) -> Iterator[tuple[Any, TrainState]]:
    """Batches, and a state with starting values."""
    cfg = training.cfg
    if cfg.end_to_end:
        own = ModelConfig(source="folder", name=str(model), revision="", dtype="float32")
        lm = load_language_model(own, toyworld=None, device=torch.device("cpu"))
        ones = torch.ones(N_LAYERS)
        # BOS stands nowhere, so that all tokens count
        sequences = np.random.default_rng(0).integers(2, 250, (BATCH, CONTEXT)).astype(np.int32)
        through = EndToEnd(lm, Scaling.by_layer(ones, 8 * ones, WIDTH))
        with SequenceBatches(sequences, through, cfg, layout.data) as data:
            yield data, start(cfg, *data.beginning(), layout)
        return
    made, options, _ = DATA[training.data]
    with batches(cfg, layout, made(BATCH, layout.rows(BATCH)), **options) as data:
        if cfg.adapter_rank:
            base = Transcoder(N_LAYERS, cfg.n_features, D_MODEL)
            init.uniform(base, generator=torch.Generator().manual_seed(0))
            yield data, state_from_base(cfg, base, scaling(), layout)
        else:
            yield data, beginning(cfg, data, layout)


def steps_of(training: Training, layout: Layout, model: Path) -> list[dict[str, Any]]:
    """What was sent in each of a few steps: of the first two with dead features, and of every other with a row."""
    cfg = training.cfg
    found: list[dict[str, Any]] = []
    with _begun(training, layout, model) as (data, state), Sent() as sent:
        state.idle[:, ::3] = 10**9

        def asked() -> bool:
            """Before the first step counters of dead features were added up; what came in belongs to the step."""
            found[-1]["dead"] = state.n_dead
            return False

        class Data:
            def get(self, index: int) -> Any:
                sent.taken()
                found.append({"counted": -layout.wire_bytes, "row": False})
                return data.get(index)

        def advance(tokens: int) -> None:
            found[-1]["counted"] += layout.wire_bytes
            found[-1]["calls"] = sent.taken()
            if len(found) == 2:
                # none of them is dead any more
                state.idle.zero_()
                state.n_dead = 0

        hooks: dict[str, Any] = {
            "log": lambda row: found[-1].update(row=True),
            "checkpoint": lambda state, l0=None: None,
            "advance": advance,
            "stop": asked,
        }
        loop.train(cfg, state, Data(), layout=layout, **hooks)
    return found


def main(folder: Path, model: Path) -> None:
    ranks = distributed.init()
    torch.set_num_threads(1)
    found = {}
    for name, own in WIRINGS[ranks.size].items():
        # torch.distributed does not take groups back, and all trainings have the same number of features
        layout = layouts.arrange(
            own,
            CASES["jumprelu"].n_features,
            ranks,
            strategy=own.strategy,
            feature_ranks=own.feature_ranks,
            device=torch.device("cpu"),
        )
        for label, training in TRAININGS.items():
            if possible(training, own):
                short = replace(training, cfg=training.under(own))
                found[f"{name}/{label}"] = steps_of(short, layout, model)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
