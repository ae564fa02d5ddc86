"""Trainings that must come out the same on any number of ranks."""

import dataclasses
from typing import Any

import torch
from tests.training.helpers import batches, beginning, tiny
from torch.distributed.tensor import DTensor

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.parallel import ParallelConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig, TrainConfig
from circuitmill.distributed import Ranks
from circuitmill.training import loop
from circuitmill.training.parallel import layout as layouts
from circuitmill.training.parallel.cut import join
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.state import TrainState

N_FEATURES = 20
"""Over three ranks 7, 7 and 6."""
BATCH = 48
LOSS = {
    "reconstruction": TermConfig(1.0),
    "tanh_sparsity": TermConfig(0.1, ramp_share=1.0, scale=1.0),
    "pre_activation": TermConfig(1e-2),
    "auxiliary": TermConfig(0.3, k=4),
}
PENALTIES = {
    "quadratic_l0": TermConfig(0.1, target=3.0),
    "frequency": TermConfig(0.1, scale=0.1),
    "l1": TermConfig(0.1),
}
TOP_K_LOSS = {"reconstruction": TermConfig(1.0), "auxiliary": TermConfig(0.3, k=4)}


def _case(name: str = "jumprelu", k: float = 0.0, **changes: Any) -> TrainConfig:
    return tiny(
        **{
            "n_features": N_FEATURES,
            "batch_tokens": BATCH,
            "tokens": 200 * BATCH,
            "pool_tokens": 96,
            "warmup_tokens": 480,
            "dead_tokens": 480,
            "nonlinearity": NonlinearityConfig(name, bandwidth=0.5, k=k, calibration_tokens=64),
            "loss": LOSS if name == "jumprelu" else TOP_K_LOSS,
            # of a top-k kind: so that there are more positive pre-activations than it keeps
            "init": dataclasses.replace(tiny().init, encoder_bias="firing_rate" if name == "jumprelu" else "zero"),
        }
        | changes
    )


MATRYOSHKA = ArchitectureConfig(prefixes=(3, 9, N_FEATURES))
CASES: dict[str, TrainConfig] = {
    "jumprelu": _case(),
    "topk": _case("topk", k=2.0),
    "token_topk": _case("token_topk", k=3.5),
    "batch_topk": _case("batch_topk", k=3.25),
    "batch_topk_all": _case("batch_topk_all", k=3.25),
    "groupmax": _case("groupmax", k=10.0),
    "matryoshka": _case(architecture=MATRYOSHKA),
    "matryoshka_topk": _case("batch_topk_all", k=4.0, architecture=MATRYOSHKA),
    "penalties": _case(loss=LOSS | PENALTIES),
    "low_rank": _case(architecture=ArchitectureConfig(decoder="low_rank", rank=3)),
    "tied": _case("topk", k=4.0, architecture=ArchitectureConfig(decoder="target", pair_scale=True, pair_offset=True)),
    "skip": _case(architecture=ArchitectureConfig(topology="plt", skip=True)),
    "crosscoder": _case(architecture=ArchitectureConfig(topology="crosscoder")),
    "micro_batches": _case(optimizer__micro_batches=2),
}
CPU = torch.device("cpu")
STRATEGIES = {
    "ddp": ParallelConfig("ddp"),
    "fsdp": ParallelConfig("fsdp"),
    "features": ParallelConfig("features"),
    "overlap": ParallelConfig("features", overlap=True),
    "mesh": ParallelConfig("mesh", feature_ranks=2),
}


def tried(strategy: str, size: int, case: str) -> bool:
    """Whether a case can be divided so: groups of two features do not fit into chunks of seven or five."""
    if strategy == "mesh" and size != 4:
        return False
    return not (case == "groupmax" and size > 2 and strategy in ("features", "overlap"))


def arranged(strategy: str, cfg: TrainConfig, ranks: Ranks, device: torch.device = CPU) -> Layout:
    own = STRATEGIES.get(strategy, ParallelConfig("single"))
    return layouts.arrange(
        own, cfg.n_features, ranks, strategy=own.strategy, feature_ranks=own.feature_ranks, device=device
    )


class Doubles:
    """Batches in float64, so that another order of sums is all that tells layouts apart, and not for long."""

    def __init__(self, cfg: TrainConfig, layout: Layout) -> None:
        self._batches = batches(cfg, layout)

    def __enter__(self) -> "Doubles":
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.__exit__(None, None, None)

    def get(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self._batches.get(index)
        return x.double(), y.double()


def one_step(cfg: TrainConfig, layout: Layout) -> dict[str, torch.Tensor]:
    """Whole gradients of a step with dead features, in float64, before and after clipping, and its figures."""
    torch.set_default_dtype(torch.float64)
    with Doubles(cfg, layout) as data:
        pair = data.get(0)
        state = beginning(cfg, data, layout)
    dead = torch.zeros(state.transcoder.n_sources, cfg.n_features, dtype=torch.bool, device=layout.device)
    dead[:, ::3] = True
    state.idle = torch.where(dead[:, layout.shard.first : layout.shard.last], 10**9, 0)
    state.density, state.n_dead = torch.full_like(state.density, 0.1), int(dead.sum())
    found: dict[str, torch.Tensor] = {}
    clip = state.optimizer.clip

    def keep(most: float, norm: float) -> None:
        found.update({f"gradient.{name}": value for name, value in _gradients(state, layout).items()})
        clip(most, norm)
        found.update({f"clipped.{name}": value for name, value in _gradients(state, layout).items()})

    state.optimizer.clip = keep
    _, figures = loop._step(cfg, state, pair, layout, asked=layout.ranks.rank == 1)
    values = {"norm": figures.grad_norm, "loss": figures.loss, "asked": float(figures.stopping)}
    values |= {f"term.{name}": value for name, value in figures.terms.items()}
    found |= {name: torch.tensor(value) for name, value in values.items()}
    return found | {"l0": figures.l0, "least": figures.least}


def _gradients(state: TrainState, layout: Layout) -> dict[str, torch.Tensor]:
    """Of every parameter, put together from all ranks."""
    axes = state.transcoder.feature_axes() if layout.features.size > 1 else {}
    found = {}
    for parameter, name in state.optimizer.names.items():
        gradient, axis = parameter.grad, axes.get(name)
        assert gradient is not None
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        elif axis is not None:
            gradient = layout.features.join(gradient, axis, layout.shard.total)
        found[name] = gradient.clone()
    return found


def curve(cfg: TrainConfig, layout: Layout) -> dict[str, torch.Tensor]:
    """Figures of every step of a training in float64, and what it ends in."""
    torch.set_default_dtype(torch.float64)
    every = dataclasses.replace(cfg, monitor=dataclasses.replace(cfg.monitor, log_tokens=BATCH))
    rows: list = []
    hooks: dict[str, Any] = {"log": rows.append, "checkpoint": lambda state, l0=None: None}
    with Doubles(every, layout) as data:
        state = beginning(every, data, layout)
        hooks |= {"advance": lambda tokens: None, "stop": lambda: False}
        loop.train(every, state, data, layout=layout, **hooks)
    found = {key: torch.tensor([row[key] for row in rows]) for key in ("loss", "ev", "grad_norm", "dead")}
    found["l0"] = torch.tensor([sum(row["l0"]) for row in rows])
    whole = join(state.transcoder, layout, cfg.architecture)
    if whole is not None:
        found |= {f"trained.{name}": value.detach() for name, value in whole.named_parameters()}
    return found
