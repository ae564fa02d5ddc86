"""Bytes that the training of a rank needs, by arithmetic: what is always there, and the moments at which most is.

| moment | parameters, moments of the optimizer and the batch, and |
|---|---|
| start | maps from which encoder biases are set; no moments of the optimizer yet |
| forward | what autograd keeps of all sources |
| backward | what it keeps of the sources that are left, and the gradients so far, of which some are made twice |
| reduction | all gradients, and the copy that is sent |
| update | all gradients, and what the optimizer works with |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from circuitmill.config.train import OVER_TOKENS, TrainConfig
from circuitmill.training.parallel import activations
from circuitmill.training.parallel.activations import FLOAT, Real
from circuitmill.training.parallel.census import Census, Division, Parameter, Shape
from circuitmill.training.parallel.gradients import BUCKET

_HALF = 2
"""Bytes of a bfloat16."""
_COUNTERS = 40
"""Bytes per feature of counters of firing, with those of the batch at hand."""
_ADAM8 = 2 * (1 + FLOAT / 256)
"""Bytes per number: two codes, and a scale for 256 of each."""
_ADAM8_LEAST = 4096
"""Parameters of fewer numbers have moments in float32."""


@dataclass(frozen=True)
class Memory:
    """Of one rank, where the training runs."""

    weights: int
    gradients: int
    optimizer: int
    batch: int
    """Inputs and outputs of a batch, the last batch's outputs, and counters of firing."""
    activations: int
    """What autograd keeps of a micro-batch."""
    moments: dict[str, int]
    """Everything at once, by moment."""
    dense: bool
    """Whether activations are taken to be dense."""
    share: float
    """Of places that are taken to be kept otherwise."""

    @property
    def moment(self) -> str:
        """When most is needed."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        """What is needed then."""
        return self.moments[self.moment]


def stored_bytes(parameter: Parameter, cfg: TrainConfig) -> int:
    """Of a parameter, and of its gradient."""
    small = cfg.optimizer.precision == "bf16" and parameter.trained and parameter.matrix
    return (_HALF if small else FLOAT) * parameter.numel


def optimizer_bytes(parameter: Parameter, cfg: TrainConfig) -> int:
    """Of what an optimizer keeps of a parameter."""
    if not parameter.trained:
        return 0
    name = cfg.optimizer.name
    if name == "adam8bit" and parameter.numel >= _ADAM8_LEAST and parameter.numel % 256 == 0:
        return round(_ADAM8 * parameter.numel)
    if name == "muon" and parameter.matrix:
        return FLOAT * parameter.numel
    moment = _HALF if cfg.optimizer.moments == "bf16" and parameter.matrix else FLOAT
    return 2 * moment * parameter.numel + _by_row(parameter, cfg)


def _by_row(parameter: Parameter, cfg: TrainConfig) -> int:
    """Of what lazy updates keep: when a feature had a gradient last, and what it has missed since."""
    own = cfg.optimizer
    if not own.lazy or not parameter.matrix or parameter.features_axis is None:
        return 0
    return (3 if own.weight_decay else 2) * FLOAT * math.prod(parameter.shape[: parameter.features_axis + 1])


def memory(
    cfg: TrainConfig,
    shape: Shape,
    census: Census,
    division: Division,
    *,
    device: str,
    dead: float,
) -> Memory:
    """What the rank needs that has most.

    Args:
        cfg: Of the training.
        shape: Of the activations.
        census: Of the whole transcoder.
        division: How ranks share it.
        device: cpu or cuda.
        dead: Share of features that are taken to be dead, for the auxiliary term.
    """
    here = census.here(division)
    weights = sum(stored_bytes(p, cfg) for p in here)
    gradients = sum(stored_bytes(p, cfg) for p in here if p.trained)
    optimizer = sum(optimizer_bytes(p, cfg) for p in here)
    rows = cfg.batch_tokens // division.data_ranks
    tokens = max(1, rows // cfg.optimizer.micro_batches)
    n_features = -(-cfg.n_features // division.feature_ranks)
    n_sources = census.topology.n_sources
    layer = FLOAT * shape.n_layers * shape.d_model
    batch = 4 * rows * layer + _COUNTERS * n_sources * n_features
    pass_ = _Pass(cfg, shape, census, division, tokens, n_features, device, dead)
    base = weights + optimizer + batch
    before = gradients if cfg.optimizer.micro_batches > 1 else 0
    bound = cfg.init.encoder_bias == "firing_rate" and not cfg.base
    moments = {
        "start": weights + pass_.unsharded + batch + (3 * FLOAT * cfg.batch_tokens * n_features if bound else 0),
        "forward": base + before + pass_.forward(),
        "backward": base + before + pass_.backward(),
        "reduction": base + gradients + pass_.reduction(),
        "update": base + gradients + _update(here, cfg),
    }
    own = pass_.kept
    return Memory(
        weights,
        gradients,
        optimizer,
        batch,
        activations=round(pass_.n_sources * own.forward),
        moments={name: round(size) for name, size in moments.items()},
        dense=own.dense,
        share=own.share,
    )


class _Pass:
    """Forward and backward pass of one micro-batch."""

    def __init__(
        self,
        cfg: TrainConfig,
        shape: Shape,
        census: Census,
        division: Division,
        tokens: int,
        n_features: int,
        device: str,
        dead: float,
    ) -> None:
        self.cfg, self.census, self.division = cfg, census, division
        self.n_sources = census.topology.n_sources
        self._map = FLOAT * tokens * n_features
        shards = division.ranks > 1
        over_tokens = cfg.nonlinearity.name in OVER_TOKENS
        elsewhere = division.feature_ranks > 1 or (over_tokens and division.data_ranks > 1)
        self.kept = activations.kept(
            cfg,
            tokens=tokens,
            n_features=n_features,
            d_model=shape.d_model,
            device=device,
            shards=shards,
            elsewhere=elsewhere,
            dead=dead,
        )
        self._at_once = activations.ranked_at_once(cfg, device=device, shards=shards, elsewhere=elsewhere) * self._map
        self._written = activations.written(census.topology, cfg, tokens, shape.d_model)
        prefixes = max(1, len(cfg.architecture.prefixes))
        self._outputs = prefixes * FLOAT * tokens * shape.n_layers * shape.d_model
        one = Division("single") if division.strategy == "fsdp" else division
        self._whole = census.here(one)
        """Parameters as they are while a batch is worked on."""

    @property
    def unsharded(self) -> int:
        """What fully_shard divides at the start, and gathers for the passes."""
        return sum(stored_bytes(p, self.cfg) for p in self._whole) if self.division.strategy == "fsdp" else 0

    def _rounded(self) -> Real:
        """Copies of parameters in the type of the products, which autograd keeps."""
        precision, dense = self.cfg.optimizer.precision, self.kept.dense
        numbers = {True: 0, False: 0}
        for parameter in self._whole:
            if parameter.matrix:
                numbers[parameter.name == "W_enc"] += parameter.numel
        if precision in ("bf16_autocast", "fp16"):
            return _HALF * (numbers[True] + (numbers[False] if dense else 0))
        # the product with few places is in float32
        return FLOAT * numbers[False] if precision == "bf16" and not dense else 0.0

    def forward(self) -> Real:
        """At the end, or while all sources are ranked."""
        own = self.kept
        while_evaluated = self.n_sources * own.forward + sum(self._written) + 3 * self._outputs
        in_terms = self.n_sources * own.forward + own.forward_moment + 4 * self._outputs
        # torch keeps what has arrived beside what it is copied to, until the pass ends
        return 2 * self.unsharded + self._rounded() + max(self.n_sources * self._at_once, while_evaluated, in_terms)

    def backward(self) -> Real:
        """Source after source, the last one first."""
        own, gathered = self.kept, self.unsharded
        weighs = not self.cfg.active_kinds().isdisjoint(("tanh_sparsity", "l1"))
        blocks = [stored_bytes(p, self.cfg) for p in self._whole if p.own_blocks and p.trained]
        others = [stored_bytes(p, self.cfg) for p in self._whole if not p.own_blocks and p.trained]
        by_source = len(blocks) == self.n_sources
        worst = 0.0
        for source in range(self.n_sources):
            last = source == self.n_sources - 1
            first_block = 0 if weighs else source
            # the gradients of decoder norms are all there from the beginning
            found = sum(blocks[first_block:]) if by_source else sum(blocks)
            maps = own.backward * (source + 1) + own.backward_moment + (0 if last else sum(others))
            # a source's gradient comes as a part of a stack that is zero elsewhere, or in the place of another one
            again = max([*others, (2 if weighs else 1) * (blocks[source] if by_source else max(blocks, default=0))])
            products = own.backward * source + self._map + sum(others) + again
            worst = max(worst, sum(self._written[: source + 1]) + found + max(maps, products))
        return gathered + self._rounded() + 3 * self._outputs + worst

    def reduction(self) -> Real:
        """The copy of gradients that is sent."""
        if self.division.strategy == "fsdp":
            # whole gradients, and as they are scattered
            return 2 * sum(stored_bytes(p, self.cfg) for p in self._whole if p.trained)
        if self.division.data_ranks == 1:
            return 0.0
        return max(_buckets([p for p in self._whole if p.trained], self.cfg), default=0)


def _buckets(parameters: Sequence[Parameter], cfg: TrainConfig) -> list[int]:
    """Bytes of gradients that are sent together, types apart; one parameter alone needs no copy."""
    found: list[list[Parameter]] = []
    sizes = {p.name: stored_bytes(p, cfg) // max(1, p.numel) for p in parameters}
    for size in dict.fromkeys(sizes.values()):
        here: list[Parameter] = []
        for parameter in [p for p in parameters if sizes[p.name] == size]:
            if here and sum(p.numel for p in here) + parameter.numel > BUCKET:
                found.append(here)
                here = []
            here.append(parameter)
        found.append(here)
    return [sum(stored_bytes(p, cfg) for p in bucket) for bucket in found if len(bucket) > 1]


def _update(here: tuple[Parameter, ...], cfg: TrainConfig) -> Real:
    """What the optimizer needs for a moment."""
    trained = [p for p in here if p.trained]
    largest = max((p.numel for p in trained if p.matrix), default=0)
    needs = [0.0]
    if cfg.optimizer.precision == "bf16" and not cfg.optimizer.by_rows:
        # parameter and gradient in float32, random numbers, their sum and what is rounded
        needs.append(5 * FLOAT * largest)
    if cfg.optimizer.name == "schedule_free":
        needs.append(FLOAT * sum(p.numel for p in trained))
    if cfg.optimizer.lazy:
        # features that have caught up, for a checkpoint
        needs.append(FLOAT * sum(p.numel for p in trained if p.matrix))
    if cfg.optimizer.name == "adam8bit":
        needs.append(5 * FLOAT * largest)
    if cfg.optimizer.name == "muon":
        matrix = max((p.numel // _stacked(p) for p in trained if p.matrix), default=0)
        needs.append(6 * FLOAT * matrix)
    return max(needs)


def _stacked(parameter: Parameter) -> int:
    """Matrices in a stack."""
    return parameter.shape[1] if parameter.own_blocks else parameter.shape[0]
