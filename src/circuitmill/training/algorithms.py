"""Optimizers of torch's interface that a configuration names, over a transcoder's trained parameters."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from circuitmill.config.train import TrainConfig
from circuitmill.core.adam import RowAdam
from circuitmill.core.decoders import Untied
from circuitmill.core.muon import Muon
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Trained:
    """Trained parameters, or their stand-ins, by what they are."""

    stacks: dict[int, list[nn.Parameter]]
    """Matrices: stacks [_ _ _], by the axis along which they are stacked."""
    others: list[nn.Parameter]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """All stacks."""
        return [parameter for stack in self.stacks.values() for parameter in stack]


def sorted_out(
    transcoder: Transcoder, names: Mapping[nn.Parameter, str], stand_ins: Mapping[nn.Parameter, nn.Parameter]
) -> Trained:
    """What is trained of a transcoder.

    Args:
        transcoder: Has the parameters.
        names: Those that are trained.
        stand_ins: What optimizers get in the place of some.
    """
    # [feature target d_model]; all other stacks are along the first axis
    by_target = {p for module in transcoder.modules() if isinstance(module, Untied) for p in module.parameters()}
    trained = Trained({0: [], 1: []}, [])
    for parameter in names:
        group = trained.stacks[int(parameter in by_target)] if parameter.ndim == 3 else trained.others
        group.append(stand_ins.get(parameter, parameter))
    return trained


def algorithms(
    transcoder: Transcoder, trained: Trained, names: Mapping[nn.Parameter, str], cfg: TrainConfig, seed: str
) -> list[torch.optim.Optimizer]:
    """One or more optimizers, which share the rate.

    Args:
        transcoder: Has the parameters.
        trained: What is optimized.
        names: Of the parameters.
        cfg: Of the training.
        seed: Of random rounding.

    Raises:
        ConfigError: a package is missing, or an option does not fit the transcoder.
    """
    own = cfg.optimizer
    adam: dict[str, Any] = {"lr": cfg.lr, "betas": (own.beta1, own.beta2), "eps": own.eps}
    everything = [*trained.matrices, *trained.others]
    decayed = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((trained.matrices, own.weight_decay), (trained.others, 0.0))
        if params
    ]
    match own.name:
        case "adam" | "adamw" if own.by_rows:
            rest = [torch.optim.AdamW(trained.others, fused=True, weight_decay=0.0, **adam)] if trained.others else []
            return [*_by_rows(transcoder, trained, names, cfg, adam, seed), *rest]
        case "adam":
            return [torch.optim.Adam(everything, fused=True, **adam)]
        case "adamw":
            return [torch.optim.AdamW(decayed, fused=True, **adam)]
        case "adam8bit":
            return [package("torchao.optim", "torchao").Adam8bit(everything, **adam)]
        case "muon":
            stacks = [{"params": params, "stack": axis} for axis, params in trained.stacks.items() if params]
            muon = {"weight_decay": own.weight_decay, "momentum": own.beta1, "match_adam": True}
            rest = [torch.optim.AdamW(trained.others, fused=True, weight_decay=0.0, **adam)] if trained.others else []
            return [*([Muon(stacks, lr=cfg.lr, **muon)] if stacks else []), *rest]
        case "schedule_free":
            return [_schedule_free(decayed, adam)]


def _by_rows(
    transcoder: Transcoder,
    trained: Trained,
    names: Mapping[nn.Parameter, str],
    cfg: TrainConfig,
    adam: dict[str, Any],
    seed: str,
) -> list[RowAdam]:
    """Adam of the matrices, if there are any."""
    own, axes = cfg.optimizer, _axes(transcoder) if cfg.optimizer.lazy else {}
    groups: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
    for parameter in trained.matrices:
        groups.setdefault(axes.get(names[parameter]), []).append((names[parameter], parameter))
    if not groups:
        return []
    return [
        RowAdam(
            [{"params": params, "axis": axis} for axis, params in groups.items()],
            weight_decay=own.weight_decay,
            moments=torch.bfloat16 if own.moments == "bf16" else torch.float32,
            seed=seed,
            **adam,
        )
    ]


def _axes(transcoder: Transcoder) -> dict[str, int | None]:
    """Along which decoders list features.

    Encoders are few beside them, and what fires depends on them: an encoder that waits while its bias goes on moving
    let features of BatchTopK die (benchmarks/README.md, convergence.py).
    """
    try:
        return {name: axis for name, axis in transcoder.feature_axes().items() if name.startswith("decoder.")}
    except ShapeError as error:
        raise ConfigError(
            "an architecture whose features each have rows of their own with lazy",
            found=error.found,
            where="train.optimizer.lazy",
            fix="set it to false",
        ) from error


def _schedule_free(groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    inner = package("schedulefree", "schedulefree").AdamWScheduleFree(groups, **adam)
    inner.train()
    return inner


def package(module: str, name: str) -> ModuleType:
    """A module of a package that not every installation has.

    Raises:
        ConfigError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the package {name}, which this optimizer is from",
            found=str(error),
            where="train.optimizer.name",
            fix=f"pip install {name}",
        ) from error
