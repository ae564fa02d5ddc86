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
    if not own.lazy or not _waits(parameter) or parameter.features_axis is None:
        return 0
    return (3 if own.weight_decay else 2) * FLOAT * math.prod(parameter.shape[: parameter.features_axis + 1])


def _waits(parameter: Parameter) -> bool:
    """Whether lazy updates leave rows of it alone."""
    return parameter.matrix and parameter.name.startswith("decoder.")


def memory(
    cfg: TrainConfig,
    shape: Shape,
    census: Census,
    division: Division,
    *,
    device: str,
    dead: float,
    grows: bool = True,
) -> Memory:
    """What the rank needs that has most.

    Args:
        cfg: Of the training.
        shape: Of the activations.
        census: Of the whole transcoder.
        division: How ranks share it.
        device: cpu or cuda.
        dead: Share of features that are taken to be dead, for the auxiliary term.
        grows: Whether more features may fire than at the start, as they do early in a training without a k.
    """
    reads = max(map(len, census.topology.reads))
    shares = activations.shares(cfg, device, activations.kept_share(cfg, shape.d_model, reads), grows=grows)
    found = [_memory(cfg, shape, census, division, device, dead, share) for share in shares]
    return max(found, key=lambda each: each.peak)


def _memory(
    cfg: TrainConfig, shape: Shape, census: Census, division: Division, device: str, dead: float, share: float
) -> Memory:
    """With so many places kept."""
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
    pass_ = _Pass(cfg, shape, census, division, tokens, n_features, device, dead, share)
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
        activations=round(n_sources * own.forward),
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
        share: float,
    ) -> None:
        self.cfg, self.census, self.division = cfg, census, division
        topology = census.topology
        over_tokens = cfg.nonlinearity.name in OVER_TOKENS
        self._work = activations.Work(
            tokens=tokens,
            n_features=n_features,
            d_model=shape.d_model,
            n_sources=topology.n_sources,
            reads=max(map(len, topology.reads)),
            device=device,
            ranked_over=division.feature_ranks * (division.data_ranks if over_tokens else 1),
            dead=dead,
            share=share,
        )
        self.kept = activations.kept(cfg, self._work)
        self._written = activations.written(topology, cfg, tokens, shape.d_model)
        layer = FLOAT * tokens * shape.d_model
        self._outputs = max(1, len(cfg.architecture.prefixes)) * shape.n_layers * layer
        self._inputs = sum(map(len, topology.reads)) * layer
        """By source, in one piece each."""
        one = Division("single") if division.strategy == "fsdp" else division
        self._whole = census.here(one)
        """Parameters as they are while a batch is worked on."""

    @property
    def unsharded(self) -> int:
        """What fully_shard divides at the start, and gathers for the passes."""
        return sum(stored_bytes(p, self.cfg) for p in self._whole) if self.division.strategy == "fsdp" else 0

    def forward(self) -> Real:
        """While the last source is encoded or all are, when all are added up, or in the terms of the loss."""
        own, n_sources = self.kept, self._work.n_sources
        before = 0 if own.together else n_sources - 1
        encoding = before * own.encoded + sum(self._written[:before]) + own.encoding + self._rounded_encoders()
        decoding = n_sources * own.encoded + sum(self._written) + max(map(self._wide, range(n_sources)))
        # in one piece, with biases; by prefix or by layer at first
        apart = bool(self.cfg.architecture.prefixes) or self.cfg.parallel.overlap
        adding_up = n_sources * own.encoded + sum(self._written) + (2 + apart) * self._outputs
        in_terms = n_sources * own.forward + own.forward_moment + 4 * self._outputs
        # torch keeps what has arrived beside what it is copied to, until the pass ends
        stays = 2 * self.unsharded + self._inputs + sum(self._rounded_decoders())
        return stays + max(encoding, decoding, adding_up, in_terms)

    def backward(self) -> Real:
        """Source after source, the last one first; then gradients of what all sources have are put together."""
        own, kinds = self.kept, self.cfg.active_kinds()
        # what terms of the loss send to decoders and encoders is there from the beginning
        revived = self._work.dead > 0 and "auxiliary" in kinds
        encoders_first = not own.dense and (revived or "pre_activation" in kinds)
        blocks, n_sources, rounded = self._blocks, self._work.n_sources, self._rounded_decoders()
        encoders = sum(stored_bytes(p, self.cfg) for p in self._whole if p.name == "W_enc" and p.trained)
        others = [
            stored_bytes(p, self.cfg) for p in self._whole if p.trained and not p.own_blocks and p.name != "W_enc"
        ]
        # the error and its square, or what they send back
        worst = n_sources * own.begun + own.backward_moment + 2 * self._outputs + sum(rounded)
        for source in range(n_sources):
            # sources that were encoded at once are decoded first
            left, passed = (n_sources, 0) if own.together else (source + 1, n_sources - 1 - source)
            found = sum(blocks[0 if revived or not self._by_source else source :])
            found += sum(others) * (1 if revived else (n_sources - source) / n_sources)
            found += encoders if encoders_first else encoders * passed / n_sources
            block = blocks[source] if self._by_source else max([*blocks, max(others) / n_sources])
            decoded = self._parted(source) + left * own.backward + own.backward_moment + self._sums(source)
            decoded += self._wide(source) + sum(rounded[: source + 1]) + (block if revived else 0)
            # several decoders of a source are passed before its nonlinearity
            several = 0 if self._by_source else own.backward + own.dense * self._work.map
            placed = (left - 1) * own.backward + several + sum(rounded[:source]) + self._again(block)
            worst = max(worst, found + max(decoded, placed, left * own.backward + encoders / n_sources))
        worst = max(worst, sum(blocks) + sum(others) + encoders + max(encoders, *others))
        return self.unsharded + self._inputs + 2 * self._outputs + worst

    def _again(self, block: Real) -> Real:
        """Gradients of a source's decoders besides their sum: of the product, and of the norms that terms look at."""
        several = (*activations.WEIGHED, "auxiliary")
        added = self.cfg.architecture.prefixes or not self.cfg.active_kinds().isdisjoint(several)
        return (2 if added else 1) * block

    def _parted(self, source: int) -> Real:
        """The gradient of what a source has written, if it is copied from that of the sums."""
        all_layers = len(self.census.topology.writes[source]) == self.census.topology.n_layers
        whole = all_layers and not self.cfg.architecture.prefixes
        return 0 if whole or self.kept.dense else self._written[source]

    @property
    def _blocks(self) -> list[int]:
        """Gradients of decoders that are a source's own."""
        return [stored_bytes(p, self.cfg) for p in self._whole if p.own_blocks and p.trained]

    @property
    def _by_source(self) -> bool:
        return len(self._blocks) == self._work.n_sources

    def _decoders(self, source: int) -> Real:
        """Numbers in what is multiplied with a source's activations."""
        if self._by_source:
            return [p.numel for p in self._whole if p.own_blocks and p.trained][source]
        return sum(p.numel for p in self._whole if p.matrix and p.name != "W_enc") / self._work.n_sources

    def _rounded_decoders(self) -> list[Real]:
        """Copies in the type of the products, by source: autograd keeps them where all places are worked on."""
        rounds = self.kept.dense and self.cfg.optimizer.precision not in ("float32", "bf16")
        return [rounds * _HALF * self._decoders(source) for source in range(self._work.n_sources)]

    def _rounded_encoders(self) -> Real:
        """Of one source, while its product is computed."""
        if self.cfg.optimizer.precision in ("float32", "bf16"):
            return 0
        return _HALF * self._work.reads * self._work.n_features * self._work.d_model

    def _wide(self, source: int) -> Real:
        """A copy in float32 of decoders in bfloat16, or of their gradient: on a CPU few places are added up in it."""
        copied = self.cfg.optimizer.precision == "bf16" and self._work.device == "cpu" and not self.kept.dense
        return copied * FLOAT * self._decoders(source)

    def _sums(self, source: int) -> Real:
        """On a GPU sums over columns are made in parts: of 512 columns, and of features that are active often."""
        if self._work.device == "cpu":
            return 0
        columns = self._written[source] / (FLOAT * self._work.tokens)
        return FLOAT * self.kept.places * max(math.ceil(columns / 512), 2 * columns / 1024)

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
        needs.append(FLOAT * sum(p.numel for p in trained if _waits(p)))
    if cfg.optimizer.name == "adam8bit":
        needs.append(5 * FLOAT * largest)
    if cfg.optimizer.name == "muon":
        matrix = max((p.numel // _stacked(p) for p in trained if p.matrix), default=0)
        needs.append(6 * FLOAT * matrix)
    return max(needs)


def _stacked(parameter: Parameter) -> int:
    """Matrices in a stack."""
    return parameter.shape[1] if parameter.own_blocks else parameter.shape[0]
