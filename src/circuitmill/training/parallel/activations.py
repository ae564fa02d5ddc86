"""What the evaluation of a micro-batch and its gradient keep in memory besides parameters, by arithmetic.

Where all places of a source are worked on, the unit is a map: float32 numbers for every token and feature of one
source. Where only the places that matter are (`core.encoding`), what stays is so many bytes for each of them, and maps
are there for a moment, while they are found. The tables below are counts of what autograd keeps and of what is made
meanwhile, taken from the code that they describe; tests compare them with what torch allocates.
"""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from statistics import NormalDist

from circuitmill.config.names import is_import_path
from circuitmill.config.train import OVER_SOURCES, TOP_K, TrainConfig
from circuitmill.core.encoding import RANKED
from circuitmill.core.topology import Topology
from circuitmill.kernels.sparse import WORTHWHILE

FLOAT, INT = 4, 8
Real = float | int


@dataclass(frozen=True)
class Amount:
    """Of one source: what stays, and what is there for a moment, in the forward and in the backward pass."""

    forward: Real
    forward_moment: Real
    begun: Real
    """When the backward pass begins."""
    backward: Real
    """When it has passed the terms of the loss, which come first."""
    backward_moment: Real

    def __add__(self, other: "Amount") -> "Amount":
        """What stays adds up; of moments the worst counts."""
        return Amount(
            self.forward + other.forward,
            max(self.forward_moment, other.forward_moment),
            self.begun + other.begun,
            self.backward + other.backward,
            max(self.backward_moment, other.backward_moment),
        )

    def __mul__(self, factor: Real) -> "Amount":
        """Of something that is so large."""
        return Amount(*(factor * each for each in astuple(self)))


NOTHING = Amount(0, 0, 0, 0, 0)
_MAPS = {"jumprelu": Amount(2, 0.5, 2, 2, 2.25), "relu": Amount(2, 0.25, 1, 1, 2)}
"""Maps where all places are worked on: pre-activations and activations, and masks for a moment."""
_MAPS_RANKED = Amount(2.25, 0, 1.25, 1.25, 1)
"""Of top-k kinds, with the mask."""
_MAPS_UNKNOWN = Amount(5, 1, 4, 4, 2.25)
"""Somebody else's nonlinearity, which is taken to keep a map of its own besides what it is given and returns."""
_WHERE = 4 * INT
"""Bytes of a kept place: its feature and its token, and the same sorted by feature."""
_PLACES = {"jumprelu": Amount(_WHERE + 3 * FLOAT, 3 * FLOAT, _WHERE + 3 * FLOAT, _WHERE + 3 * FLOAT, 5 * FLOAT)}
"""Bytes of a kept place with what is there: pre-activation, threshold and activation."""
_PLACES_ELSE = Amount(_WHERE + 2 * FLOAT, 3 * FLOAT, _WHERE + FLOAT, _WHERE + FLOAT, 4 * FLOAT)
"""After a ReLU the pre-activation is not kept."""
_MAPS_OF_TERMS = {
    "tanh_sparsity": Amount(1, 1, 1, 1, 2),
    "l1": Amount(0, 1, 0, 1, 1.25),
    "quadratic_l0": Amount(0, 1.25, 0, 0, 2.25),
    "frequency": Amount(0, 1.25, 0, 0, 2.25),
    "pre_activation": Amount(1, 1, 1, 1, 2.25),
}
_PLACES_OF_TERMS = {
    "tanh_sparsity": Amount(2 * FLOAT, 3 * FLOAT, 2 * FLOAT, FLOAT, 3 * FLOAT),
    "l1": Amount(FLOAT, 2 * FLOAT, FLOAT, FLOAT, 2 * FLOAT),
    "quadratic_l0": Amount(2 * FLOAT, 3 * FLOAT, 2 * FLOAT, 0, 4 * FLOAT),
    "frequency": Amount(2 * FLOAT, 3 * FLOAT, 2 * FLOAT, 0, 4 * FLOAT),
    "pre_activation": Amount(FLOAT, 3 * FLOAT, FLOAT, FLOAT, 3 * FLOAT),
}
_BELOW_ALL = Amount(2, 1, 1, 0, 1)
"""Maps of the pre-activation term where places above the threshold are left out: it computes all of them again."""
_SAME = {"l1": "tanh_sparsity"}
"""Of two terms that both are there, the first keeps nothing in the backward pass that the second does not: the gradient
of activations."""
WEIGHED = ("tanh_sparsity", "l1")
"""Terms that multiply activations by what features write."""
_TERM_UNKNOWN = Amount(1, 1, 1, 1, 2.25)
"""Maps: a term that is somebody else's function is taken to keep one."""
_GROWTH = 8
"""Features that fire on a token, by those at the start. In the demo's training on 400,000 tokens they were 6.5 times as
many after 20,000 (8.6 times in one layer), before the sparsity term had risen, and fewer later."""
_KTHVALUE = 3
"""On a CPU a choice among whole rows copies them, with the place of each number."""
_CANDIDATES, _BLOCKS = 1.15, 4
"""For each place that is kept: candidates, and blocks of a row whose maxima are compared (`kernels.select`)."""
_CANDIDATE, _RANKED = FLOAT + INT, 96
"""Bytes of a candidate, and while candidates are ranked: its place in many forms, the row that it stands in."""
_BITS = 1 / 32 + 1 / 128
"""Maps while places above a threshold are found on a GPU: a bit for each place, and counts by tile."""


@dataclass(frozen=True)
class Work:
    """What a rank does in a micro-batch."""

    tokens: int
    n_features: int
    """On this rank."""
    d_model: int
    n_sources: int
    reads: int
    """Layers that a source reads, at most."""
    device: str
    ranked_over: int
    """Ranks on which the parts of a row are of which the largest numbers are kept."""
    dead: float
    """Share of the features that are dead, which the auxiliary term looks at."""
    share: float
    """Of places that matter."""

    @property
    def map(self) -> int:
        """Bytes of float32 numbers for every token and feature of a source."""
        return FLOAT * self.tokens * self.n_features


@dataclass(frozen=True)
class Kept:
    """Of one source and one micro-batch, in bytes, unless said."""

    dense: bool
    share: float
    """Of the places that are taken to be kept if activations are not dense."""
    places: float
    """Number of them; zero if activations are dense."""
    together: bool
    """Whether all sources are encoded at once."""
    encoding: Real
    """While it is encoded, or all are if that is at once, itself included."""
    encoded: Real
    forward: Real
    """With what terms of the loss keep."""
    forward_moment: Real
    begun: Real
    backward: Real
    backward_moment: Real


def kept(cfg: TrainConfig, work: Work) -> Kept:
    """What stays of one source between its forward and its backward pass, and what is there meanwhile.

    Args:
        cfg: Nonlinearity, terms of the loss and precision.
        work: Of the rank.
    """
    share, name = work.share, cfg.nonlinearity.name
    dense = is_import_path(name) or share > _worthwhile(cfg, work.device)
    places = 0.0 if dense else share * work.tokens * work.n_features
    own = _all_places(cfg) * work.map if dense else _few_places(cfg, work, places)
    terms = sum(_terms(cfg, work, dense, places), start=NOTHING)
    all_ = own + terms
    together = is_import_path(name) or name in OVER_SOURCES or (name in RANKED and work.ranked_over > 1)
    if name in TOP_K:
        encoding = _while_ranked(cfg, work, own, dense, share, together=together)
    elif dense:
        encoding = (work.n_sources if together else 1) * own.forward + own.forward_moment
    else:
        finding = own.forward + own.forward_moment + _finding(cfg, work) * work.map
        encoding = max(_product(cfg, work) * work.map, finding)
    return Kept(
        dense,
        share,
        places,
        together,
        encoding,
        own.forward,
        all_.forward,
        terms.forward_moment,
        all_.begun,
        all_.backward,
        all_.backward_moment,
    )


def _worthwhile(cfg: TrainConfig, device: str) -> float:
    """Share of places up to which only these are worked on (`training.objective.settings_at`)."""
    return {"auto": WORTHWHILE.get(device, 0.0), "dense": -1.0, "sparse": 1.0}[cfg.products]


def _all_places(cfg: TrainConfig) -> Amount:
    """Maps of a source."""
    name = cfg.nonlinearity.name
    found = _MAPS_UNKNOWN if is_import_path(name) else _MAPS.get(name, _MAPS_RANKED)
    if cfg.optimizer.precision != "float32":
        # factors are rounded copies: activations stay in both types until the product is made, then in the smaller one;
        # for a ReLU, and until terms that multiply them have been passed, as they are too
        stays, moment = (0.5, 0) if name == "relu" else (-0.5, 2.75 if name == "jumprelu" else 1.5)
        weighed = name != "relu" and not cfg.active_kinds().isdisjoint(WEIGHED)
        found = found + Amount(0.5, 0, stays + weighed, stays, moment)
    return found + Amount(0, 0, 0, 0, 3) if cfg.architecture.prefixes else found


def _few_places(cfg: TrainConfig, work: Work, places: float) -> Amount:
    """Bytes of a source."""
    found = _PLACES.get(cfg.nonlinearity.name, _PLACES_ELSE)
    if work.device != "cpu":
        # sums by feature are made after sorting
        found = found + Amount(0, 5 * INT, 0, 0, 6 * INT)
    prefixes = len(cfg.architecture.prefixes)
    if prefixes:
        # each stretch has places of its own, and a mask
        more = _WHERE + FLOAT + prefixes
        found = found + Amount(more, 0, more, more, 0)
    ends = INT * (work.tokens * max(1, prefixes) + work.n_features)
    return found * places + Amount(ends, 0, ends, ends, 0)


def _terms(cfg: TrainConfig, work: Work, dense: bool, places: float) -> Iterator[Amount]:
    """Bytes of a source, by term of the loss."""
    kinds = cfg.active_kinds()
    for kind in sorted(kinds):
        if is_import_path(kind):
            yield _TERM_UNKNOWN * work.map
        elif kind == "auxiliary":
            yield _auxiliary(cfg, work, dense)
        elif kind == "pre_activation" and not dense and cfg.nonlinearity.name in TOP_K:
            yield _BELOW_ALL * work.map
        elif kind in _MAPS_OF_TERMS:
            found = _MAPS_OF_TERMS[kind] * work.map if dense else _PLACES_OF_TERMS[kind] * places
            yield replace(found, backward=0) if _SAME.get(kind) in kinds else found


def _auxiliary(cfg: TrainConfig, work: Work, dense: bool) -> Amount:
    """The strongest dead features are few places, chosen among all places of dead features."""
    if not work.dead:
        return NOTHING
    most = max(term.k or 1 for name, term in cfg.active_terms().items() if (term.term or name) == "auxiliary")
    places = work.tokens * min(most, work.dead * work.n_features)
    # their gradient is put among zeros where pre-activations of all places are kept
    maps = Amount(0, 2 * work.dead, 0, dense, dense)
    encoders = 0 if dense else FLOAT * work.dead * work.n_features * work.d_model * work.reads
    return _PLACES_ELSE * places + maps * work.map + Amount(0, 2 * work.dead * work.map + encoders, 0, 0, 0)


def _product(cfg: TrainConfig, work: Work) -> Real:
    """Maps while pre-activations of a source are computed: a sum over layers, or in the type of the products first."""
    if work.reads > 1:
        return 3
    return 1 if cfg.optimizer.precision == "float32" else 1.5


def _finding(cfg: TrainConfig, work: Work) -> Real:
    """Maps while places above thresholds are found."""
    if work.device == "cuda" and work.reads == 1:
        return _BITS
    strides = cfg.nonlinearity.name == "jumprelu" and cfg.nonlinearity.band_stride > 1
    return 1.75 if strides else 1.25


def _while_ranked(cfg: TrainConfig, work: Work, own: Amount, dense: bool, share: float, *, together: bool) -> Real:
    """Bytes while candidates of a source, or of all, are found and ranked."""
    name, all_places = cfg.nonlinearity.name, work.tokens * work.n_features
    sources = work.n_sources if together else 1
    # a mask is made from where the kept ones are
    kept_ = sources * (own.forward + (3 * INT * share * all_places if dense else own.forward_moment))
    product = _product(cfg, work)
    if name == "groupmax":
        # the largest of each group, and which it is
        return max(kept_, work.map * max(product, 1 + 3 * share + 5 * INT / FLOAT * share))
    of_row = share * work.ranked_over * (work.n_sources if name in OVER_SOURCES else 1)
    width = max(1, math.floor(1 / (_BLOCKS * of_row)))
    copies = _KTHVALUE if work.device == "cpu" and of_row < 1 else 0
    maxima = (copies + (width > 1)) / width
    # positive ones, of which there are as many as negative ones at the start
    candidates = min(_CANDIDATES * of_row, 0.5) * all_places
    before = sources - 1 if dense else 0
    found = work.map * (before + max(product, 1.75, 1 + maxima)) + sources * candidates * _CANDIDATE
    ranked = work.map * (sources if dense else 0) + sources * candidates * _RANKED
    return max(found, ranked, kept_)


def shares(cfg: TrainConfig, device: str, start: float, *, grows: bool) -> list[float]:
    """Shares of places that matter, one of which needs most.

    Args:
        cfg: Of the training.
        device: cpu or cuda.
        start: The share at the start.
        grows: Whether more features may fire later. Without a k that bounds them they do.
    """
    if not grows or cfg.nonlinearity.name in TOP_K:
        return [start]
    fire = min(cfg.init.l0 / cfg.n_features, 0.5)
    most = min(start + (_GROWTH - 1) * fire, 1.0)
    # as many as few places may be, and more
    return [start, most, *(share for share in [_worthwhile(cfg, device)] if start < share < most)]


def kept_share(cfg: TrainConfig, d_model: int, reads: int) -> float:
    """Share of places that matter at the start of the training, by its configuration.

    With jumprelu these are all above the threshold and, on some tokens, those less than half the kernel's width below
    it. Pre-activations are taken as normal, with the spread that the starting values of encoders give them.
    """
    own, n_features = cfg.nonlinearity, cfg.n_features
    if own.name in TOP_K:
        return min(1.0, max(own.k, own.k_start) / n_features)
    fires = min(cfg.init.l0 / n_features, 0.5)
    by_rate = cfg.init.encoder_bias == "firing_rate" or bool(cfg.base)
    if own.name != "jumprelu":
        return fires if by_rate else 0.5
    normal, spread = NormalDist(), _spread(cfg, d_model) * math.sqrt(reads)
    threshold = normal.inv_cdf(1 - fires) if by_rate else cfg.init.threshold / spread
    above = 1 - normal.cdf(threshold)
    below = 1 - normal.cdf(threshold - own.bandwidth / 2 / spread) - above
    return above + below / own.band_stride


def _spread(cfg: TrainConfig, d_model: int) -> float:
    """Standard deviation of pre-activations of one layer's inputs with mean square 1, at the start."""
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
