"""Bytes that a rank hands to collectives in a step, as `collectives.Group` counts them: the size of what goes in.

| what | who | bytes |
|---|---|---|
| batch | ranks that share features | a rank's own rows as they are stored, and recomputed outputs in float32 |
| reconstructions | the same | prefixes x tokens x layers x d_model, in the type of the wire |
| rankings | the same; those over tokens also ranks that share a batch | rows x (k + 1), in float32 |
| target l0 | ranks that share features | features that fire, by source and token, in float32 |
| language model | ranks that share features, with end-to-end terms | what replaces each MLP, and its gradient |
| balance | ranks that share a batch, with a balanced term | what is balanced, in float32 |
| shared gradients | ranks that share features | of the second halves of low-rank decoders |
| gradients | ranks that share a batch | of all that is here, with counts of firing in float32 |
| figures | all | two numbers per term of the loss, two per source and a few more, in float64 |

Only if features are dead: the strongest ones are ranked, and what they explain is added up. Only with a row of metrics:
explained variance. Places are sent besides where equal numbers compete for a rank, which activations hardly do.
With end-to-end terms there are twice as many rankings, and BOS is counted here, of which nothing is sent.

With fsdp torch itself gathers parameters and scatters gradients. `Group` does not see that; it is counted here as what
goes in, like the rest.
"""

from dataclasses import dataclass, field

from circuitmill.config.names import is_import_path
from circuitmill.config.train import END_TO_END, TOP_K, TrainConfig
from circuitmill.training.parallel.census import Census, Division, Parameter, Shape
from circuitmill.training.parallel.gradients import shared_inside
from circuitmill.training.parallel.memory import stored_bytes

_FLOAT, _DOUBLE, _INT = 4, 8, 8
_WIRES = {"float32": 4, "bf16": 2}


@dataclass(frozen=True)
class Stored:
    """How the activations of a token come to the trainer."""

    token_bytes: int
    """Of inputs, and of outputs if they come too."""
    recomputed: bool = False
    """Whether outputs are computed from the inputs."""


@dataclass(frozen=True)
class Payload:
    """By name, in bytes."""

    step: dict[str, int] = field(default_factory=dict)
    """Of every step."""
    dead: dict[str, int] = field(default_factory=dict)
    """Of a step besides, if any feature is dead."""
    row: dict[str, int] = field(default_factory=dict)
    """Of a row of metrics besides."""
    torch: dict[str, int] = field(default_factory=dict)
    """Of every step besides, sent by fully_shard and not counted by `Group`."""

    @property
    def most(self) -> int:
        """Of a step with dead features, whoever sends it."""
        return sum(sum(part.values()) for part in (self.step, self.dead, self.torch))


def payload(cfg: TrainConfig, shape: Shape, census: Census, division: Division, stored: Stored) -> Payload:
    """What the first rank sends in a step.

    Args:
        cfg: Of the training; top-k kinds with the k that they end with.
        shape: Of the activations.
        census: Of the whole transcoder.
        division: How ranks share it.
        stored: How activations come in.
    """
    if division.ranks == 1:
        return Payload()
    tokens = cfg.batch_tokens // division.data_ranks
    step: dict[str, int] = {}
    dead: dict[str, int] = {}
    n_sources = census.topology.n_sources
    layer = shape.n_layers * shape.d_model
    wide = _WIRES[cfg.parallel.wire]
    if division.feature_ranks > 1:
        rows = cfg.batch_tokens // division.ranks
        if not cfg.end_to_end:
            step["batch"] = rows * (stored.token_bytes + (_FLOAT * layer if stored.recomputed else 0))
        step["reconstructions"] = max(1, len(cfg.architecture.prefixes)) * tokens * layer * wide
        if "quadratic_l0" in cfg.active_kinds():
            step["target l0"] = _terms_of(cfg, "quadratic_l0") * n_sources * tokens * _FLOAT
        if cfg.end_to_end:
            step["language model"] = tokens * layer * wide + tokens * (layer - shape.d_model) * _FLOAT
        shared = [p for p in census.parameters if p.trained and p.name in shared_inside([p.name])]
        if shared:
            step["shared gradients"] = sum(stored_bytes(p, cfg) for p in shared)
        for name, term in cfg.active_terms().items():
            if (term.term or name) == "auxiliary":
                more = {"rankings of dead features": n_sources * tokens * ((term.k or 1) + 1) * _FLOAT}
                more["explained by dead features"] = tokens * layer * wide
                dead = {what: dead.get(what, 0) + size for what, size in more.items()}
    ranked = _rankings(cfg, division, n_sources, tokens)
    if ranked:
        step["rankings"] = ranked
    balanced = sum(
        bool(term.balance) and (term.term or name) in END_TO_END for name, term in cfg.active_terms().items()
    )
    if balanced and division.data_ranks > 1:
        step["balance"] = cfg.optimizer.micro_batches * balanced * 2 * _FLOAT
    step |= _gradients(cfg, census, division)
    step["figures"] = _DOUBLE * (2 * len(cfg.active_terms()) + 5 + 2 * n_sources)
    row = {"explained variance": _DOUBLE * (1 + layer + 2 * shape.n_layers)} if division.data_ranks > 1 else {}
    return Payload(step, dead, row, _fully_shard(cfg, census, division))


def _terms_of(cfg: TrainConfig, kind: str) -> int:
    return sum((term.term or name) == kind for name, term in cfg.active_terms().items())


def _rankings(cfg: TrainConfig, division: Division, n_sources: int, tokens: int) -> int:
    """Largest numbers of each row, of all micro-batches."""
    own = cfg.nonlinearity
    if is_import_path(own.name) or own.name not in TOP_K or own.name == "groupmax":
        return 0
    parts = cfg.optimizer.micro_batches
    over_all = tokens // parts * division.data_ranks
    rows, k, over_tokens = {
        "topk": (tokens * n_sources, own.k, False),
        "token_topk": (tokens, own.k * n_sources, False),
        "batch_topk": (parts * n_sources, own.k * over_all, True),
        "batch_topk_all": (parts, own.k * over_all * n_sources, True),
    }[own.name]
    groups = (division.feature_ranks > 1) + (over_tokens and division.data_ranks > 1)
    # the language model reads what is kept, source by source, after the other terms have asked for all at once
    passes, asked = (2, 1 + n_sources) if cfg.end_to_end else (1, 0)
    # and ranks have unequal numbers of tokens, and tell each other how many
    ragged = parts * asked * _INT if over_tokens and division.data_ranks > 1 else 0
    return passes * groups * rows * (round(k) + 1) * _FLOAT + ragged


def _gradients(cfg: TrainConfig, census: Census, division: Division) -> dict[str, int]:
    """Of ranks that have other tokens."""
    if division.data_ranks == 1:
        return {}
    n_features = -(-cfg.n_features // division.feature_ranks)
    counts = _FLOAT * (census.topology.n_sources * n_features + 1)
    if division.strategy == "fsdp":
        return {"firings": counts}
    return {"gradients": sum(stored_bytes(p, cfg) for p in census.here(division) if p.trained), "firings": counts}


def _fully_shard(cfg: TrainConfig, census: Census, division: Division) -> dict[str, int]:
    """A rank's parts of all parameters, and all gradients, once per micro-batch; padded, so that parts are equal."""
    if division.strategy != "fsdp":
        return {}
    here = census.here(division)
    parts = cfg.optimizer.micro_batches

    def padded(parameters: tuple[Parameter, ...]) -> int:
        return sum(stored_bytes(p, cfg) for p in parameters)

    trained = tuple(p for p in here if p.trained)
    return {
        "parameters gathered": parts * padded(here),
        "gradients scattered": parts * division.ranks * padded(trained),
    }
