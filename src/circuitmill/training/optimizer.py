"""Optimizers: one interface around several, which sets the rate, and saves the state as named tensors.

| name | matrices (parameters with three axes) | biases, thresholds, factors |
|---|---|---|
| adam | Adam; in blocks of rows with moments bf16, precision bf16 or lazy (`core.adam`) | Adam |
| adamw | Adam, decoupled weight decay; in blocks of rows as adam | without decay |
| adam8bit | Adam, moments of 8 bits in blocks of 256; of fewer than 4,096 numbers float32 (torchao) | Adam |
| muon | Muon by (source, layer), momentum beta1, rate matched to Adam's, weight decay | Adam |
| schedule_free | schedule-free AdamW, weight decay; its average is evaluated and saved (schedulefree) | without decay |

Parameters that do not require a gradient when the optimizer is made are not trained, not averaged over ranks, not
clipped and not saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.adam import RowAdam
from circuitmill.core.rounding import generator_at, round_stochastically
from circuitmill.core.transcoder import Transcoder
from circuitmill.training import algorithms
from circuitmill.training.parallel.gradients import local
from circuitmill.training.precision import LossScale, require_finite

_GROUP_STATE = ("k", "weight_sum", "lr_max")
"""Numbers of schedule-free groups that change from step to step."""


class Optimizer:
    """Optimizers of torch's interface over a transcoder's trained parameters.

    A parameter in bfloat16 that an optimizer cannot update itself is updated in float32, one at a time, and rounded
    stochastically: its optimizer works on a stand-in that has numbers only during that update.

    Args:
        names: Trained parameters.
        stand_ins: What the optimizers hold in place of parameters that are stored in bfloat16.
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
        self._factor = 1.0
        """What gradients are multiplied by in the next update."""
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

    def clip(self, most: float, norm: float) -> None:
        """Scale gradients down to at most this norm in the next update, most of them while they are read for it.

        Args:
            most: The limit.
            norm: Of the gradient, over all parameters and all ranks.
        """
        # as torch.nn.utils.clip_grad_norm_ does it
        self._factor = min(1.0, most / (norm + 1e-6))

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
        self._factor = 1.0
        for parameter in self.names:
            parameter.grad = None

    @torch.no_grad()
    def _update(self, number: int) -> None:
        self._scale_gradients()
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

    def _scale_gradients(self) -> None:
        """By what `clip` found: in a pass of its own only where an optimizer cannot do it while it updates."""
        own_pass = []
        for inner in self._inner:
            if isinstance(inner, RowAdam):
                inner.factor = self._factor
            elif all(group.get("fused") and _all_float32(group["params"]) for group in inner.param_groups):
                # what torch.amp.GradScaler gives them, and they divide by; it is read as float32
                device = inner.param_groups[0]["params"][0].device
                scale = (
                    None if self._factor == 1.0 else torch.tensor(1 / self._factor, dtype=torch.float32, device=device)
                )
                inner.grad_scale, inner.found_inf = scale, None  # pyright: ignore[reportAttributeAccessIssue]
            else:
                own_pass.append(inner)
        if self._factor == 1.0:
            return
        held = {parameter: self._held[self._stand_ins.get(parameter, parameter)][0] for parameter in self.names}
        gradients = [local(p.grad) for p, inner in held.items() if p.grad is not None and inner in own_pass]
        if gradients:
            torch._foreach_mul_(gradients, self._factor)

    def _step_all(self) -> None:
        with torch.compiler.set_stance("force_eager") if self._eager else nullcontext():
            for inner in self._inner:
                inner.step()

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        held = self._stand_ins.get(parameter, parameter)
        return self._held[held][0].state.get(held, {})

    @torch.no_grad()
    def _evaluated(self, parameter: nn.Parameter) -> Tensor | None:
        """What is evaluated and exported in place of a parameter; None if that is the parameter itself.

        Schedule-free training moves y = (1 - beta1) z + beta1 x and keeps z; the average x follows from both. With
        lazy, rows that have had no gradient for some steps make the movements that they have missed.
        """
        inner, group = self._held[self._stand_ins.get(parameter, parameter)]
        value = self._training.get(parameter, parameter.data)
        if isinstance(inner, RowAdam):
            return inner.caught_up(parameter, value)
        z = self._state(parameter).get("z")
        return None if z is None else value.lerp(z, 1 - 1 / group["betas"][0])

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
        """Parameters become what is evaluated and exported: averages of schedule_free, caught up, and float32.

        What to go on training from is still there for `tensors`.
        """
        for parameter in self.names:
            found = self._evaluated(parameter)
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

        They are not copied, but for what is evaluated in place of a parameter: that is the parameter here, and what
        goes on being trained is `optimizer/y/<name>`.
        """
        named: dict[str, Tensor] = {}
        for parameter, name in self.names.items():
            value, evaluated = self._training.get(parameter, parameter.detach()), self._evaluated(parameter)
            named[f"parameter.{name}"] = local(value if evaluated is None else evaluated)
            if evaluated is not None:
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
            numbers = algorithms.package("torchao.optim.subclass_8bit", "torchao").OptimState8bit
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
        if parameter.dtype == torch.bfloat16 and not cfg.optimizer.by_rows
    }
    trained = algorithms.sorted_out(transcoder, names, stand_ins)
    seed = f"{cfg.seed}/{salt}" if salt else str(cfg.seed)
    device = transcoder.b_dec.device
    return Optimizer(
        names,
        stand_ins,
        algorithms.algorithms(transcoder, trained, names, cfg, seed),
        seed=seed,
        loss_scale=LossScale(device) if cfg.optimizer.precision == "fp16" else None,
        # torchao compiles its update; without a GPU there may be no compiler, and less to gain
        eager=cfg.optimizer.name == "adam8bit" and device.type == "cpu",
    )


def _all_float32(parameters: list[nn.Parameter]) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in parameters)
