"""Nonlinearities between pre-activation and activation.

Each is a function of pre-activations h of all sources, [token source feature], and one row of `NONLINEARITIES`. ReLU,
JumpReLU, TopK and GroupMax look at one token and source at a time, the others at more. `core.encoding` computes the
same from the few places that matter.

JumpReLU is discontinuous at its threshold theta, so the derivative of the expected loss by theta is estimated
with a rectangular kernel (Rajamanoharan et al. 2024, "Jumping Ahead", section 3; a straight-through estimator):

    a = h * H(h - theta),   da/dh = H(h - theta),   da/dtheta = -(theta / bandwidth) * rect((h - theta) / bandwidth)

with rect(u) = 1 for |u| < 1/2. The trained parameter is t = log(theta). The chain rule gives da/dt = da/dtheta * theta;
one reading of "Circuits Updates, January 2025" hands da/dtheta to t directly. `derivative` names the choice.
`pass_through` adds (theta / bandwidth) rect to da/dh. Below the threshold the kernel is a sum over places that do not
fire, of which there may be many. Where only some of the tokens are looked at there, these places weigh more (`below`),
and the estimate has the same expected value.

Top-k kinds keep what is largest after a ReLU (Gao et al. 2024, section 2.3; Bussmann et al. 2024, "BatchTopK"). Of
equal values those with the lower index are kept, so that the choice is the same everywhere. Gradients pass through what
is kept and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitmill.config.names import require_known
from circuitmill.core.imports import function_at
from circuitmill.core.parts import WHOLE, Parts

Derivative = Literal["chain", "direct"]


class _JumpReLU(torch.autograd.Function):
    """JumpReLU of the log-threshold with the straight-through derivative of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        log_threshold: Tensor,
        bandwidth: float,
        derivative: Derivative,
        pass_through: bool,
        below: float,
    ) -> Tensor:
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.derivative, ctx.pass_through, ctx.below = bandwidth, derivative, pass_through, below
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        needs_pre, needs_threshold = ctx.needs_input_grad[:2]
        near = None
        if needs_threshold or ctx.pass_through:
            near = _near(pre, threshold, gradient, ctx.bandwidth, ctx.below)
        by_pre = torch.where(pre > threshold, gradient, 0.0) if needs_pre else None
        if by_pre is not None and near is not None and ctx.pass_through:
            by_pre = by_pre + near * (threshold / ctx.bandwidth)
        by_log_threshold = None
        if needs_threshold and near is not None:
            # theta is the same for all tokens, so it can wait until after the sum over them
            factor = threshold.square() if ctx.derivative == "chain" else threshold
            by_log_threshold = near.sum_to_size(threshold.shape) * (-factor / ctx.bandwidth)
        return by_pre, by_log_threshold, None, None, None, None


def _near(pre: Tensor, threshold: Tensor, gradient: Tensor, bandwidth: float, below: float) -> Tensor:
    """The gradient at places within the kernel, zero elsewhere."""
    near = torch.where((pre - threshold).abs_() < bandwidth / 2, gradient, 0.0)
    return near if below == 1.0 else torch.where(pre > threshold, near, near * below)


def jumprelu(
    pre: Float[Tensor, "*token feature"],
    log_threshold: Float[Tensor, "*layer feature"],
    bandwidth: float = 1.0,
    derivative: Derivative = "chain",
    pass_through: bool = False,
    below: float = 1.0,
) -> Float[Tensor, "*token feature"]:
    """Keep a pre-activation where it exceeds its threshold, strictly; zero elsewhere.

    >>> jumprelu(torch.tensor([[0.5, 2.0, 1.0]]), torch.zeros(3))
    tensor([[0., 2., 0.]])

    Args:
        pre: For one source, for all, or for chosen entries with one threshold each.
        log_threshold: Same trailing axes as `pre`.
        bandwidth: Width of the kernel of the threshold's derivative, in units of the pre-activation. It has
            no effect on the value.
        derivative: What reaches the log-threshold: "chain" is the true chain rule, "direct" leaves out one
            factor theta.
        pass_through: Whether pre-activations within the kernel receive (theta / bandwidth) of the gradient too.
        below: Weight of places that do not exceed the threshold, in the kernel.
    """
    return _JumpReLU.apply(pre, log_threshold, bandwidth, derivative, pass_through, below)


class _Step(torch.autograd.Function):
    """Heaviside step of pre-activation less threshold, with a derivative by the log-threshold alone."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, log_threshold: Tensor, bandwidth: float, derivative: Derivative, below: float
    ) -> Tensor:
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.derivative, ctx.below = bandwidth, derivative, below
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None, None]:
        pre, threshold = ctx.saved_tensors
        near = _near(pre, threshold, gradient, ctx.bandwidth, ctx.below).sum_to_size(threshold.shape)
        factor = threshold if ctx.derivative == "chain" else torch.ones_like(threshold)
        return None, near * (-factor / ctx.bandwidth), None, None, None


def step(
    pre: Float[Tensor, "*token feature"],
    log_threshold: Float[Tensor, "*layer feature"],
    bandwidth: float,
    derivative: Derivative = "chain",
    below: float = 1.0,
) -> Float[Tensor, "*token feature"]:
    """1 where a pre-activation exceeds its threshold, else 0: what L0 counts ("Jumping Ahead", section 3).

    dH/dtheta = -(1 / bandwidth) rect((h - theta) / bandwidth); there is no derivative by the pre-activation.
    """
    return _Step.apply(pre, log_threshold, bandwidth, derivative, below)


@dataclass(frozen=True)
class Settings:
    """What a nonlinearity may use besides pre-activations and thresholds."""

    k: float = 0.0
    """Features to keep per token and source, on average."""
    bandwidth: float = 1.0
    derivative: Derivative = "chain"
    pass_through: bool = False
    parts: Parts = WHOLE
    """Where the other features and tokens of a ranking are."""
    band_stride: int = 1
    """JumpReLU: below the threshold, the kernel is evaluated on one token in so many, where places are few."""
    band_offset: int = 0
    """The first of these tokens."""
    most: float = 0.0
    """Share of places up to which only these are worked on; below zero all always are."""


Function = Callable[
    [Float[Tensor, "token source feature"], Float[Tensor, "source feature"], Settings],
    Float[Tensor, "token source feature"],
]
"""From pre-activations and log-thresholds to activations; zero or positive."""


def _relu(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    return pre.relu()


def _jumprelu(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    return jumprelu(pre, log_threshold, settings.bandwidth, settings.derivative, settings.pass_through)


def _topk(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    return _keep(pre, "token source feature -> (token source) feature", settings.k, settings.parts)


def _token_topk(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    return _keep(pre, "token source feature -> token (source feature)", settings.k * pre.shape[1], settings.parts)


def _batch_topk(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    k = settings.k * settings.parts.n_tokens(pre.shape[0])
    return _keep(pre, "token source feature -> source (token feature)", k, settings.parts, over_tokens=True)


def _batch_topk_all(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    k = settings.k * settings.parts.n_tokens(pre.shape[0]) * pre.shape[1]
    return _keep(pre, "token source feature -> 1 (token source feature)", k, settings.parts, over_tokens=True)


def _keep(pre: Tensor, pattern: str, k: float, parts: Parts, *, over_tokens: bool = False) -> Tensor:
    """The k largest positive numbers of each row, the rows being what an einops pattern makes of the tensor."""
    token, source, feature = pre.shape
    positive = pre.relu()

    def order() -> Tensor:
        rows = torch.arange(token * source, device=pre.device).view(token, source, 1) * parts.n_features(feature)
        return rearrange(rows + parts.first + torch.arange(feature, device=pre.device), pattern)

    kept = parts.largest(rearrange(positive.detach(), pattern), round(k), order, over_tokens=over_tokens)
    left, right = pattern.split(" -> ")
    back = rearrange(kept, f"{right} -> {left}", token=token, source=source, feature=feature)
    return positive * back


def _groupmax(pre: Tensor, log_threshold: Tensor, settings: Settings) -> Tensor:
    """The largest of each of k groups of consecutive features, if positive."""
    member = settings.parts.n_features(pre.shape[2]) // round(settings.k)
    groups = rearrange(pre.relu(), "token source (group member) -> token source group member", member=member)
    first = groups.detach().argmax(dim=-1, keepdim=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True)
    return rearrange(groups * mask, "token source group member -> token source (group member)")


NONLINEARITIES: dict[str, Function] = {
    "relu": _relu,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "token_topk": _token_topk,
    "batch_topk": _batch_topk,
    "batch_topk_all": _batch_topk_all,
    "groupmax": _groupmax,
}
"""Name -> function. A new one is a function of type `Function` and a row here."""


def find_nonlinearity(name: str) -> Function:
    """The row of this name, or a function elsewhere.

    Raises:
        ConfigError: no such row, then it names the nearest one; or nothing callable at the import path.
    """
    require_known(name, NONLINEARITIES, "train.nonlinearity.name")
    return NONLINEARITIES[name] if name in NONLINEARITIES else function_at(name, "train.nonlinearity.name")
