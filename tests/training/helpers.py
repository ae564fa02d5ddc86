"""A small configuration, and activations in memory that a transcoder can learn."""

import dataclasses
from typing import Any

import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.optimizer import OptimizerConfig
from circuitmill.config.train import (
    InitConfig,
    MonitorConfig,
    NonlinearityConfig,
    TermConfig,
    TrainConfig,
)
from circuitmill.core.codecs import StoredBatch, plain_batch
from circuitmill.core.scaling import Scaling
from circuitmill.training.batches import Batches
from circuitmill.training.loop import train
from circuitmill.training.parallel.layout import Layout, alone
from circuitmill.training.state import TrainState, start

N_LAYERS, D_MODEL = 2, 6

TINY = TrainConfig(
    seed=0,
    n_features=16,
    tokens=640,
    batch_tokens=32,
    pool_tokens=64,
    architecture=ArchitectureConfig(),
    nonlinearity=NonlinearityConfig("jumprelu", bandwidth=0.5),
    scaling="rms",
    init=InitConfig(threshold=0.1, encoder_bias="firing_rate", l0=4.0, decoder_bias="mean"),
    loss={
        "reconstruction": TermConfig(1.0),
        "tanh_sparsity": TermConfig(0.1, ramp_share=1.0, scale=1.0),
        "pre_activation": TermConfig(1e-3),
        "auxiliary": TermConfig(0.03, k=4),
    },
    lr=1e-2,
    schedule="linear",
    warmup_tokens=64,
    decay_share=0.3,
    optimizer=OptimizerConfig(beta2=0.99),
    dead_tokens=64,
    monitor=MonitorConfig(log_tokens=64, heldout_tokens=0),
    checkpoint_tokens=128,
    keep_checkpoints=2,
    wandb=False,
)


def tiny(**changes: Any) -> TrainConfig:
    """The small configuration with changes: `optimizer__clip_norm=1` reaches into a part, `loss__l1=` adds a term."""
    new: dict[str, Any] = {}
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if not inner:
            new[part] = value
            continue
        old = new.get(part, getattr(TINY, part))
        new[part] = {**old, inner: value} if part == "loss" else dataclasses.replace(old, **{inner: value})
    return dataclasses.replace(TINY, **new)


class Memory:
    """Outputs are a nonlinear function of the inputs of the same and earlier layers.

    `rows` are those of one rank.
    """

    def __init__(self, batch_tokens: int = TINY.batch_tokens, rows: slice | None = None) -> None:
        self.batch_tokens, self.rows = batch_tokens, rows or slice(0, batch_tokens)
        generator = torch.Generator().manual_seed(9)
        self.mix = torch.randn(N_LAYERS, D_MODEL, D_MODEL, generator=generator)
        self.asked: list[int] = []

    def pair(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and outputs of the whole batch."""
        x = torch.randn(self.batch_tokens, N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(index))
        written = torch.einsum("nld,lde->nle", x, self.mix).relu()
        return 3 * x, 0.5 * written.cumsum(dim=1)

    def batch(self, index: int) -> StoredBatch:
        self.asked.append(index)
        return plain_batch(*(side[self.rows] for side in self.pair(index)))


def scaling() -> Scaling:
    return Scaling.by_layer(torch.full((N_LAYERS,), 1 / 3), torch.tensor([0.7, 0.4]), D_MODEL)


ONE = alone(TINY.n_features)


def batches(cfg: TrainConfig, layout: Layout = ONE, source: Any = None, **options: Any) -> Batches:
    source = source or Memory(cfg.batch_tokens, layout.rows(cfg.batch_tokens))
    return Batches(source, scaling(), device=layout.device, together=layout.features, **options)


def beginning(cfg: TrainConfig, data: Batches, layout: Layout | None = None) -> TrainState:
    """As stage train does: from all rows of the first batch."""
    layout = layout or alone(cfg.n_features)
    return start(cfg, *(layout.data.gather_rows(side) for side in data.get(0)), layout)


def run(
    cfg: TrainConfig, state: TrainState | None = None, *, source: Any = None, data: Any = None, **hooks: Any
) -> tuple[TrainState, list]:
    """Train in memory; returns the state and the rows of metrics."""
    rows: list = []
    with data or batches(cfg, source=source) as data:
        layout = hooks.get("layout", alone(cfg.n_features))
        state = state or beginning(cfg, data, layout)
        defaults = {
            "layout": layout,
            "log": rows.append,
            "checkpoint": lambda state: None,
            "advance": lambda tokens: None,
            "stop": lambda: False,
        }
        train(cfg, state, data, **(defaults | hooks))
    return state, rows


def fresh(cfg: TrainConfig) -> TrainState:
    with batches(cfg) as data:
        return beginning(cfg, data)
