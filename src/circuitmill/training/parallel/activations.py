"""What the evaluation of a micro-batch and its gradient keep in memory besides parameters, by arithmetic.

The unit of most of it is a map: float32 numbers for every token and feature of one source. How many there are at a time
depends on the nonlinearity and the terms of the loss, and on whether activations are dense or, on a CPU, the few places
that matter (`kernels.sparse`). The tables below are counts of what autograd keeps, taken from the code that they
describe; tests compare them with what torch allocates.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from circuitmill.config.names import is_import_path
from circuitmill.config.train import TOP_K, TrainConfig
from circuitmill.core.topology import Topology
from circuitmill.kernels.sparse import WORTHWHILE

FLOAT, INT = 4, 8
Real = float | int


@dataclass(frozen=True)
class Maps:
    """Maps per source that stay, and those that are there for a moment, in the forward and in the backward pass."""

    forward: Real
    forward_moment: Real
    backward: Real
    backward_moment: Real

    def __add__(self, other: "Maps") -> "Maps":
        """What stays adds up; of moments the worst counts."""
        return Maps(
            self.forward + other.forward,
            max(self.forward_moment, other.forward_moment),
            self.backward + other.backward,
            max(self.backward_moment, other.backward_moment),
        )


_SPARSE = {
    "jumprelu": Maps(1, 0.25, 0, 2.25),
    "relu": Maps(2, 0.5, 1, 2),
    "by source": Maps(2.25, 1.25, 1.25, 2),
    "together": Maps(4.25, 0, 3.4, 0.1),
}
"""By nonlinearity, or how it ranks: pre-activations, and what `nonlinearity._keep` makes of them."""
_DENSE = {
    "jumprelu": Maps(2, 0.25, 2, 2.25),
    "relu": Maps(2, 0.25, 1, 2),
    "by source": Maps(3.25, 0.25, 2.25, 1),
    "together": Maps(4.25, 0, 3.4, 0),
}
_KTHVALUE = 3
"""On a CPU a choice among whole rows copies them, with the place of each number (`core.parts.largest`)."""
_TERMS = {
    "tanh_sparsity": (Maps(0, 0.25, 0, 0), Maps(1, 1, 1, 2)),
    "l1": (Maps(0, 0.25, 0, 0), Maps(0, 1, 1, 1.25)),
    "quadratic_l0": (Maps(0, 1.25, 1, 1.5), Maps(0, 1.25, 0, 2.25)),
    "frequency": (Maps(0, 1.25, 1, 2.5), Maps(0, 1.25, 0, 2.25)),
    "pre_activation": (Maps(1, 1, 1, 2), Maps(1, 1, 1, 2.25)),
}
"""Sparse and dense."""
_SAME = {"l1": "tanh_sparsity", "frequency": "quadratic_l0"}
"""Of two terms that both are there, the first keeps nothing in the backward pass that the second does not: the gradient
of activations, and pre-activations."""
_UNKNOWN = Maps(1, 1, 1, 2.25)
"""A term or nonlinearity that is somebody else's function is taken to keep a map of its own."""
_PLACE = 2 * INT + FLOAT
"""Bytes of a kept place: where it is in the matrix and in its row, and the activation."""
_PLACE_MORE = {"jumprelu": 2 * FLOAT, "tanh_sparsity": 2 * FLOAT, "l1": FLOAT}
_PLACE_MOMENT = 5 * INT
"""The gradient of a sparse product sorts them."""


@dataclass(frozen=True)
class Kept:
    """Of one source and one micro-batch, in bytes."""

    dense: bool
    share: float
    """Of the places that are taken to be kept if activations are not dense."""
    forward: Real
    forward_moment: Real
    backward: Real
    backward_moment: Real


def kept(
    cfg: TrainConfig,
    *,
    tokens: int,
    n_features: int,
    d_model: int,
    device: str,
    shards: bool,
    elsewhere: bool,
    dead: float,
) -> Kept:
    """What stays of one source between its forward and its backward pass.

    Args:
        cfg: Nonlinearity, terms of the loss and precision.
        tokens: In a micro-batch.
        n_features: On this rank.
        d_model: Width of the activations.
        device: cpu, on which few kept places are worth while, or cuda.
        shards: Whether features or tokens are shared with other ranks.
        elsewhere: Whether a part of what is ranked is on another rank.
        dead: Share of the features that are dead, which the auxiliary term looks at.
    """
    share = kept_share(cfg, d_model)
    dense = device != "cpu" or share > WORTHWHILE["cpu"]
    name = cfg.nonlinearity.name
    if is_import_path(name):
        maps = _DENSE["together"] + _UNKNOWN
        dense = True
    else:
        maps = (_DENSE if dense else _SPARSE)[_ranking(name, elsewhere=elsewhere)]
    if device == "cpu" and not shards and name in ("topk", "batch_topk"):
        # while one source is ranked, of which two maps are there besides the copies
        moment = _KTHVALUE + 2 - maps.forward
        maps = maps + Maps(0, moment, 0, 0)
    for kind in sorted(cfg.active_kinds()):
        if kind in _TERMS:
            more = _TERMS[kind][dense]
            again = _SAME.get(kind) in cfg.active_kinds()
            maps = maps + (replace(more, backward=0) if again else more)
        elif kind == "auxiliary":
            maps = maps + Maps(dead, dead, dead, 2 if dead else 0)
        elif is_import_path(kind):
            maps = maps + _UNKNOWN
    if cfg.optimizer.precision != "float32" and dense:
        # factors are rounded copies: activations stay in both types until the product is made, then in the smaller one
        maps = maps + Maps(0.5, 0, -0.5, 2.75)
    if cfg.architecture.prefixes and dense:
        maps = maps + Maps(0, 0, 0, 3)
    one = FLOAT * tokens * n_features
    places = 0.0 if dense else share * tokens * n_features
    kinds = {name, *cfg.active_kinds()}
    stays = places * (_PLACE + sum(more for kind, more in _PLACE_MORE.items() if kind in kinds))
    return Kept(
        dense,
        share,
        forward=maps.forward * one + stays,
        forward_moment=maps.forward_moment * one,
        backward=maps.backward * one + stays,
        backward_moment=maps.backward_moment * one + places * _PLACE_MOMENT,
    )


def ranked_at_once(cfg: TrainConfig, *, device: str, shards: bool, elsewhere: bool) -> Real:
    """Maps per source at the moment at which all sources are ranked together; zero if they are not."""
    name = cfg.nonlinearity.name
    if is_import_path(name) or _ranking(name, elsewhere=elsewhere) != "together":
        return 0.0
    # pre-activations by source and in one tensor, and what of them is positive; then copies, or masks
    return 3 + (_KTHVALUE if device == "cpu" and not shards else 1.25)


def _ranking(name: str, *, elsewhere: bool) -> str:
    if name in ("jumprelu", "relu"):
        return name
    over_ranks = elsewhere and name in TOP_K and name != "groupmax"
    return "together" if over_ranks or name in ("token_topk", "batch_topk_all") else "by source"


def kept_share(cfg: TrainConfig, d_model: int) -> float:
    """Share of places that matter at the start of the training, by its configuration.

    With jumprelu these are all above the threshold less half the kernel's width: more than fire. Pre-activations are
    taken as normal, with the spread that the starting values of encoders give them.
    """
    own, n_features = cfg.nonlinearity, cfg.n_features
    if own.name in TOP_K:
        return min(1.0, max(own.k, own.k_start) / n_features)
    fires = min(cfg.init.l0 / n_features, 0.5)
    by_rate = cfg.init.encoder_bias == "firing_rate" or bool(cfg.base)
    if own.name != "jumprelu":
        return fires if by_rate else 0.5
    normal, spread = NormalDist(), _spread(cfg, d_model)
    threshold = normal.inv_cdf(1 - fires) if by_rate else cfg.init.threshold / spread
    return 1 - normal.cdf(threshold - own.bandwidth / 2 / spread)


def _spread(cfg: TrainConfig, d_model: int) -> float:
    """Standard deviation of pre-activations of inputs with mean square 1, at the start."""
    bounds = {
        "uniform": 1 / math.sqrt(cfg.n_features),
        "transpose": 1 / math.sqrt(d_model),
        "january_2025": math.sqrt(d_model) / cfg.n_features,
    }
    # a uniform number has a third of the square of its bound
    return bounds[cfg.init.weights] * math.sqrt(d_model / 3)


def written(topology: Topology, cfg: TrainConfig, tokens: int, d_model: int) -> list[int]:
    """Bytes of what each source writes, by prefix: kept until all sources are in."""
    one = FLOAT * tokens * d_model * max(1, len(cfg.architecture.prefixes))
    shared = cfg.architecture.decoder == "source" and not (cfg.architecture.pair_scale or cfg.architecture.pair_offset)
    return [one * (1 if shared else len(targets)) for targets in topology.writes]
