"""Optimizers: one interface around several, which sets the rate, and saves the state as named tensors.

| name | matrices (parameters with three axes) | biases, thresholds, factors |
|---|---|---|
| adam | Adam | Adam |
| adamw | Adam, decoupled weight decay | without decay |
| adam8bit | Adam, moments of 8 bits in blocks of 256; of fewer than 4,096 numbers float32 (torchao) | Adam |
| muon | Muon by (source, layer), momentum beta1, rate matched to Adam's, weight decay | Adam |
| schedule_free | schedule-free AdamW, weight decay; its average is evaluated and saved (schedulefree) | without decay |

Parameters that do not require a gradient when the optimizer is made are not trained, not averaged over ranks, not
clipped and not saved.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.decoders import Untied
from circuitmill.core.muon import Muon
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError
from circuitmill.training.parallel.gradients import local
from circuitmill.training.precision import LossScale, generator_at, require_finite, round_stochastically

_GROUP_STATE = ("k", "weight_sum", "lr_max")
"""Numbers of schedule-free groups that change from step to step."""


class Optimizer:
    """Optimizers of torch's interface over a transcoder's trained parameters.

    A parameter in bfloat16 is updated in float32, one at a time, and rounded stochastically: its optimizer works on a
    stand-in that has numbers only during that update.

    Args:
        names: Trained parameters.
        stand_ins: What the optimizers hold in place of the parameters that are stored in bfloat16.
        inner: One or more optimizers, which share the rate.
        seed: Of the rounding.
        loss_scale: With float16.
        eager: Whether optimizers that compile their updates shall not.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        stand_ins: dict[nn.Parameter, nn.Parameter],
        inner: list[torch.optim.Optimizer],
        *,
        seed: str,
        loss_scale: LossScale | None = None,
        eager: bool = False,
    ) -> None:
        self.names, self._stand_ins, self._inner, self._seed = names, stand_ins, inner, seed
        self.loss_scale, self._eager = loss_scale, eager
        self._held: dict[nn.Parameter, tuple[torch.optim.Optimizer, dict[str, Any]]] = {
            parameter: (optimizer, group)
            for optimizer in inner
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._training: dict[nn.Parameter, Tensor] = {}
        """Values to go on training from, while the parameters hold what is evaluated instead."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the transcoder."""
        return list(self.names)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self._inner[0].param_groups[0]["lr"])

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of a loss to those of the parameters."""
        (loss if self.loss_scale is None else self.loss_scale.scaled(loss)).backward()

    def unscale(self) -> None:
        """Undo what float16 scaled gradients by; once per step, before anything looks at them."""
        if self.loss_scale is not None:
            self.loss_scale.unscale(self._inner)

    @torch.no_grad()
    def clip(self, most: float, norm: float) -> None:
        """Scale gradients down to at most this norm.

        Args:
            most: The limit.
            norm: Of the gradient, over all parameters and all ranks.
        """
        # as torch.nn.utils.clip_grad_norm_ does it
        factor = min(1.0, most / (norm + 1e-6))
        if factor < 1.0:
            torch._foreach_mul_([local(p.grad) for p in self.names if p.grad is not None], factor)

    def step(self, lr: float, *, norm: float, number: int) -> None:
        """One update at this rate; gradients are cleared.

        Args:
            lr: Learning rate.
            norm: Of the gradient. The update is left out if it is not finite and a smaller loss scale may help.
            number: Of the step; decides about rounding.

        Raises:
            DivergedError: the norm is not finite. The parameters are as before.
        """
        if self.loss_scale is None:
            require_finite(norm, "gradient norm", number)
        for group in (group for inner in self._inner for group in inner.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.loss_scale is None or self.loss_scale.accepts(norm, number):
            self._update(number)
        for parameter in self.names:
            parameter.grad = None

    @torch.no_grad()
    def _update(self, number: int) -> None:
        waiting = {parameter: parameter.grad for parameter in self._stand_ins if parameter.grad is not None}
        self._step_all()
        if not waiting:
            return
        for parameter in self.names:
            parameter.grad = None
        generator = generator_at(self._seed, number, next(iter(waiting)).device)
        for parameter, gradient in waiting.items():
            stand_in = self._stand_ins[parameter]
            stand_in.data, stand_in.grad = parameter.detach().float(), gradient.float()
            self._step_all()  # skips whatever has no gradient: all others
            parameter.copy_(round_stochastically(stand_in.data, generator))
            stand_in.grad = None
            stand_in.data = stand_in.data.new_empty(0)

    def _step_all(self) -> None:
        with torch.compiler.set_stance("force_eager") if self._eager else nullcontext():
            for inner in self._inner:
                inner.step()

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        held = self._stand_ins.get(parameter, parameter)
        return self._held[held][0].state.get(held, {})

    @torch.no_grad()
    def _averaged(self, parameter: nn.Parameter) -> Tensor | None:
        """What schedule-free training evaluates; None if that is the parameter itself.

        The optimizer moves y = (1 - beta1) z + beta1 x and keeps z; the average x follows from both.
        """
        z = self._state(parameter).get("z")
        if z is None:
            return None
        beta1 = self._held[parameter][1]["betas"][0]
        return self._training.get(parameter, parameter.data).lerp(z, 1 - 1 / beta1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, parameters are what `finish` makes of them; afterwards they have the same bits as before."""
        self.finish()
        try:
            yield
        finally:
            self._resume()

    @torch.no_grad()
    def finish(self) -> None:
        """Parameters become what is evaluated and exported: averages of schedule_free, and float32.

        What to go on training from is still there for `tensors`.
        """
        for parameter in self.names:
            found = self._averaged(parameter)
            if found is None and parameter.dtype == torch.bfloat16:
                found = parameter.data.float()
            if found is not None and parameter not in self._training:
                self._training[parameter], parameter.data = parameter.data, found

    def _resume(self) -> None:
        for parameter, value in self._training.items():
            parameter.data = value
        self._training.clear()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and state on this rank: `parameter.<name>`, `optimizer/<key>/<name>` and a few of their own.

        They are not copied. Averages of schedule_free are the parameters, and y is part of the state.
        """
        named: dict[str, Tensor] = {}
        for parameter, name in self.names.items():
            value, average = self._training.get(parameter, parameter.detach()), self._averaged(parameter)
            named[f"parameter.{name}"] = local(value if average is None else average)
            if average is not None:
                named[f"optimizer/y/{name}"] = value
            for key, entry in self._state(parameter).items():
                for part, tensor in _parts(local(entry)).items():
                    named[f"optimizer/{key}{part}/{name}"] = tensor.detach()
        if "weight_sum" in self._inner[0].param_groups[0]:
            groups = [[float(group[key]) for key in _GROUP_STATE] for group in self._inner[0].param_groups]
            named["optimizer.groups"] = torch.tensor(groups, dtype=torch.float64)
        if self.loss_scale is not None:
            named["optimizer.loss_scale"] = self.loss_scale.tensor()
        return named

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave, of parameters of the same shapes."""
        self._resume()
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, own, name = key.split("/")
                found.setdefault(name, {})[own] = value
        for parameter, name in self.names.items():
            saved = found.get(name, {})
            local(parameter).copy_(saved.pop("y", tensors[f"parameter.{name}"]))
            held = self._stand_ins.get(parameter, parameter)
            optimizer, group = self._held[held]
            if saved:
                optimizer.state[held] = _whole(saved, parameter, fused=bool(group.get("fused")))
        if "optimizer.groups" in tensors:
            for group, row in zip(self._inner[0].param_groups, tensors["optimizer.groups"].tolist(), strict=True):
                group.update(zip(_GROUP_STATE, (int(row[0]), *row[1:]), strict=True))
        if self.loss_scale is not None:
            self.loss_scale.restore(tensors["optimizer.loss_scale"])


def _parts(entry: Any) -> dict[str, Tensor]:
    """An entry of a state as plain tensors: itself, or codes, scales and the table of 8-bit numbers."""
    if not hasattr(entry, "__tensor_flatten__"):
        return {"": entry}
    return {f".{part}": getattr(entry, part) for part in entry.__tensor_flatten__()[0]}


def _whole(saved: dict[str, Tensor], parameter: nn.Parameter, *, fused: bool) -> dict[str, Tensor]:
    """The state of one parameter from plain tensors."""
    state: dict[str, Tensor] = {}
    device = parameter.device
    for key, value in saved.items():
        own, _, part = key.partition(".")
        if part:
            signed = own == "exp_avg"
            values = [saved[f"{own}.{each}"].to(device, copy=True) for each in ("codes", "scale", "qmap")]
            numbers = _package("torchao.optim.subclass_8bit", "torchao").OptimState8bit
            state[own] = numbers(*values, signed, torch.float32)
        else:
            # optimizers that are not fused count steps on the CPU
            state[own] = _like(parameter, value.to("cpu" if own == "step" and not fused else device, copy=True))
    return state


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Rows of a divided whole, if they are those of a parameter that is divided."""
    if not isinstance(parameter.data, DTensor) or value.shape != local(parameter.data).shape:
        return value
    return DTensor.from_local(
        value,
        parameter.data.device_mesh,
        parameter.data.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@dataclass(frozen=True)
class _Trained:
    """Trained parameters, or their stand-ins, by what they are."""

    stacks: dict[int, list[nn.Parameter]]
    """Matrices: stacks [_ _ _], by the axis along which they are stacked."""
    others: list[nn.Parameter]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """All stacks."""
        return [parameter for stack in self.stacks.values() for parameter in stack]


def make_optimizer(transcoder: Transcoder, cfg: TrainConfig, salt: int = 0) -> Optimizer:
    """The optimizer of this configuration over all parameters that require a gradient.

    Args:
        transcoder: Has them.
        cfg: Of the training.
        salt: Of random rounding; another one for ranks with other features.

    Raises:
        ConfigError: a package that it needs is missing, or an option does not fit it.
    """
    names = {parameter: name for name, parameter in transcoder.named_parameters() if parameter.requires_grad}
    stand_ins = {
        parameter: nn.Parameter(torch.empty(0, device=parameter.device))
        for parameter in names
        if parameter.dtype == torch.bfloat16
    }
    # [feature target d_model]; all other stacks are along the first axis
    by_target = {p for module in transcoder.modules() if isinstance(module, Untied) for p in module.parameters()}
    trained = _Trained({0: [], 1: []}, [])
    for parameter in names:
        group = trained.stacks[int(parameter in by_target)] if parameter.ndim == 3 else trained.others
        group.append(stand_ins.get(parameter, parameter))
    device = transcoder.b_dec.device
    return Optimizer(
        names,
        stand_ins,
        _inner(trained, cfg),
        seed=f"{cfg.seed}/{salt}" if salt else str(cfg.seed),
        loss_scale=LossScale(device) if cfg.optimizer.precision == "fp16" else None,
        # torchao compiles its update; without a GPU there may be no compiler, and less to gain
        eager=cfg.optimizer.name == "adam8bit" and device.type == "cpu",
    )


def _inner(trained: _Trained, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Optimizers of torch's interface."""
    own, rate = cfg.optimizer, cfg.lr
    adam: dict[str, Any] = {"lr": rate, "betas": (own.beta1, own.beta2), "eps": own.eps}
    everything = [*trained.matrices, *trained.others]
    decayed = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((trained.matrices, own.weight_decay), (trained.others, 0.0))
        if params
    ]
    match own.name:
        case "adam":
            return [torch.optim.Adam(everything, fused=True, **adam)]
        case "adamw":
            return [torch.optim.AdamW(decayed, fused=True, **adam)]
        case "adam8bit":
            return [_package("torchao.optim", "torchao").Adam8bit(everything, **adam)]
        case "muon":
            stacks = [{"params": params, "stack": axis} for axis, params in trained.stacks.items() if params]
            muon = {"weight_decay": own.weight_decay, "momentum": own.beta1, "match_adam": True}
            rest = [torch.optim.AdamW(trained.others, fused=True, weight_decay=0.0, **adam)] if trained.others else []
            return [*([Muon(stacks, lr=rate, **muon)] if stacks else []), *rest]
        case "schedule_free":
            return [_schedule_free(decayed, adam)]


def _schedule_free(groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    inner = _package("schedulefree", "schedulefree").AdamWScheduleFree(groups, **adam)
    inner.train()
    return inner


def _package(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the package {package}, which this optimizer is from",
            found=str(error),
            where="train.optimizer.name",
            fix=f"pip install {package}",
        ) from error
