"""Adam in blocks of rows: in fewer bits, or for the features alone that have a gradient.

Adam (Kingma & Ba 2015) reads and writes every weight and both of its moments in every step, with few operations on
each, so that memory decides how long it takes. Two things are saved here.

Fewer bits. Weights and moments may be bfloat16. A block is taken to float32, updated and rounded stochastically; one
random number serves the weight and both moments at a place. Expected values are those of exact numbers.

Fewer rows. With an axis that lists features, a row is what belongs to one feature, and is left alone while its gradient
is zero. Adam would go on moving it meanwhile: after step s of its last gradient, with r = beta1 / sqrt(beta2),

    w_t = w_s - m_s / (sqrt(v_s) + eps') sum_{j=s+1..t} lr_j sqrt(1 - beta2^j) / (1 - beta1^j) r^(j-s)

(weight decay left out). The sum is a number per row, which is carried along in every step; the row itself makes the
movement when it gets a gradient again, and its moments decay by beta1^(t-s) and beta2^(t-s). Learning rates, the
correction of the bias and weight decay are those of the steps that were missed. Two things deviate from Adam:

- eps is taken as it is at the last gradient, eps' = eps sqrt(1 - beta2^s). Adam's grows against the decaying sqrt(v):
  the movement of step s + k is too large by at most the share eps beta2^(-k/2) / sqrt(v_s).
- until then others see the row as it was. It is out of date by at most lr |m_s| / sqrt(v_s) sum_{k>=1} r^k, times the
  largest correction of the bias since: 9.5 learning rates at beta1 0.9 and beta2 0.99, if every gradient before had the
  same sign and size. What weight decay would have taken off is added.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.core.rounding import generator_at, number_of, rounded, uniform_bits

BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Numbers that are worked on together: on a CPU they stay in its cache (benchmarks/optimizer_step.py)."""


class RowAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, in blocks of rows.

    State of each parameter: `step`, `exp_avg` and `exp_avg_sq` as torch's; with an axis also, for each row, `row_step`
    (of its last gradient), `row_sum` (the sum above) and, with weight decay, `row_share` (what decay has left).

    Args:
        params: Groups of (name, parameter). A group's `axis` is the one that lists features, whose rows are left alone
            while they have no gradient; None updates everything.
        lr: Learning rate.
        betas: Decay of the mean gradient and of the mean squared gradient.
        eps: Added to the denominator.
        weight_decay: Share of a weight that is taken off per unit of learning rate.
        moments: Type of both moments; of float64 parameters they are float64.
        seed: Of the rounding.
    """

    def __init__(
        self,
        params: list,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
        seed: str = "",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "axis": None})
        self.factor = 1.0
        """What gradients are multiplied by in the next step."""
        self._moments, self._seed = moments, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for name, weight in zip(group["param_names"], group["params"], strict=True):
                if weight.grad is None:
                    continue
                state = self.state[weight] or self._begin(weight, group)
                state["step"] += 1
                if group["axis"] is not None:
                    self._update_rows(weight, weight.grad, state, group, f"{self._seed}/{name}")
                elif weight.is_cuda:
                    self._update_on_gpu(weight, weight.grad, state, group, f"{self._seed}/{name}")
                else:
                    self._update_all(weight, weight.grad, state, group, f"{self._seed}/{name}")

    def _begin(self, weight: Float[Tensor, "..."], group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = torch.float64 if weight.dtype == torch.float64 else self._moments
        state = self.state[weight]
        # on the CPU, so that reading it waits for nothing
        state["step"] = torch.zeros(())
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(weight, dtype=dtype)
        if group["axis"] is not None:
            rows = weight.shape[: group["axis"] + 1]
            state["row_step"] = torch.zeros(rows, dtype=torch.int32, device=weight.device)
            state["row_sum"] = torch.zeros(rows, dtype=_working(weight), device=weight.device)
            if group["weight_decay"]:
                state["row_share"] = torch.ones_like(state["row_sum"])
        return state

    def _update_all(
        self,
        weight: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        state: dict[str, Tensor],
        group: dict[str, Any],
        seed: str,
    ) -> None:
        whole = [part.view(-1) for part in (weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])]
        generator = generator_at(seed, int(state["step"]), weight.device)
        for start in range(0, weight.numel(), BLOCK["cpu"]):
            self._move(whole, slice(start, start + BLOCK["cpu"]), state["step"], group, generator)

    def _update_on_gpu(
        self,
        weight: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        state: dict[str, Tensor],
        group: dict[str, Any],
        seed: str,
    ) -> None:
        from circuitmill.kernels.adam import adam_  # needs Triton

        parts = (weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        adam_(
            *(part.view(-1, part.shape[-1]) for part in parts),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            factor=self.factor,
            step=int(state["step"]),
            seed=number_of(seed),
        )

    def _update_rows(
        self,
        weight: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        state: dict[str, Tensor],
        group: dict[str, Any],
        seed: str,
    ) -> None:
        parts = (weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        whole = [_rows(part, group["axis"]) for part in parts]
        each = {key: value.view(-1) for key, value in state.items() if key.startswith("row_")}
        step = int(state["step"])
        touched = _not_zero(whole[1])
        generator = generator_at(seed, step, weight.device)
        count = state["step"].to(weight.device)
        for index in _spans(touched, max(1, BLOCK[weight.device.type] // whole[0].shape[1])):
            self._move(whole, index, count, group, generator, {key: value[index] for key, value in each.items()})
        # what a row without a gradient misses in this step; others have missed nothing
        beta1, beta2 = group["betas"]
        kept = 1 - group["lr"] * group["weight_decay"]
        missed = step - each["row_step"].to(each["row_sum"].dtype)
        rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        each["row_sum"].mul_(kept).add_((beta1 / beta2**0.5) ** missed, alpha=rate).masked_fill_(touched, 0.0)
        if "row_share" in each:
            each["row_share"].mul_(kept).masked_fill_(touched, 1.0)
        each["row_step"].masked_fill_(touched, step)

    def _move(
        self,
        whole: Sequence[Float[Tensor, "..."]],
        index: slice | Int[Tensor, " row"],
        step: Float[Tensor, ""],
        group: dict[str, Any],
        generator: torch.Generator,
        rows: dict[str, Tensor] | None = None,
    ) -> None:
        """Update some rows of weights and moments.

        Args:
            whole: Weights, gradients and both moments.
            index: Which rows.
            step: Number of this one, from 1.
            group: Options.
            generator: Of the rounding.
            rows: What these rows have missed; None is nothing.
        """
        working = _working(whole[0])
        weight, gradient, first, second = (_taken(part, index).to(working) for part in whole)
        if self.factor != 1.0:
            gradient = gradient * self.factor
        missed = None if rows is None else (step - 1 - rows["row_step"]).to(working)[:, None]
        if rows is not None and missed is not None and missed.any():
            _catch_up(weight, first, second, rows, group)
            first.mul_(group["betas"][0] ** missed)
            second.mul_(group["betas"][1] ** missed)
        torch._fused_adamw_(
            [weight],
            [gradient],
            [first],
            [second],
            [],
            [step],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        noise = None
        for part, new in ((whole[0], weight), (whole[2], first), (whole[3], second)):
            if part.dtype != working:
                noise = uniform_bits(new.shape, generator) if noise is None else noise
                new = rounded(new, noise)
            if not isinstance(index, slice):
                part.index_copy_(0, index, new)
            elif part.dtype != working:
                part[index] = new

    @torch.no_grad()
    def caught_up(self, parameter: Tensor, values: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """A parameter as it is when all rows have made the movements that they have missed; None if none can have.

        Args:
            parameter: One of those that are optimized; it is left alone.
            values: What it is when it is trained.
        """
        group = next(group for group in self.param_groups if any(parameter is each for each in group["params"]))
        state = self.state.get(parameter)
        if group["axis"] is None or not state:
            return None
        found = values.detach().to(_working(values), copy=True)
        whole = [_rows(part, group["axis"]) for part in (found, state["exp_avg"], state["exp_avg_sq"])]
        each = {key: value.view(-1) for key, value in state.items() if key.startswith("row_")}
        count = max(1, BLOCK[parameter.device.type] // whole[0].shape[1])
        for start in range(0, len(whole[0]), count):
            index = slice(start, start + count)
            weight, first, second = (part[index].to(found.dtype) for part in whole)
            _catch_up(weight, first, second, {key: value[index] for key, value in each.items()}, group)
        return found


def _catch_up(
    weight: Float[Tensor, "row column"],
    first: Float[Tensor, "row column"],
    second: Float[Tensor, "row column"],
    rows: dict[str, Tensor],
    group: dict[str, Any],
) -> None:
    """Make the movements that rows have missed; moments are those of the last gradient."""
    # rows that never had a gradient have moments of zero
    seen = rows["row_step"].clamp(min=1).to(weight.dtype)
    below = second.sqrt().add_((group["eps"] * (1 - group["betas"][1] ** seen).sqrt())[:, None])
    if "row_share" in rows:
        weight.mul_(rows["row_share"][:, None])
    weight.sub_(torch.div(first, below, out=below).mul_(rows["row_sum"][:, None]))


def _working(weight: Tensor) -> torch.dtype:
    """Type in which a parameter is updated."""
    return torch.promote_types(weight.dtype, torch.float32)


def _rows(values: Float[Tensor, "..."], axis: int) -> Float[Tensor, "row column"]:
    """A row for each feature, of a parameter whose features are listed along an axis."""
    return values.view(values.shape[: axis + 1].numel(), -1)


def _taken(values: Float[Tensor, "..."], index: slice | Int[Tensor, " row"]) -> Float[Tensor, "..."]:
    """Some rows: themselves if they follow each other, else a copy."""
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


def _not_zero(values: Float[Tensor, "row column"]) -> Bool[Tensor, " row"]:
    """Rows in which not every number is zero."""
    blocks = values.split(max(1, BLOCK[values.device.type] // values.shape[1]))
    # with `any`, or the largest absolute value, a CPU takes several times as long
    return torch.cat([(block.amax(dim=1) > 0) | (block.amin(dim=1) < 0) for block in blocks])


def _spans(chosen: Bool[Tensor, " row"], count: int) -> Iterator[slice | Int[Tensor, " row"]]:
    """Chosen rows, at most so many together; those that follow each other as a slice, which needs no copy."""
    for index in chosen.nonzero().flatten().split(count):
        if len(index) == 0:
            return
        first, last = int(index[0]), int(index[-1])
        yield slice(first, last + 1) if last - first + 1 == len(index) else index
