"""How many tokens each stage of a variant works on, and how much it computes, from the configuration. No torch here.

Work is counted in operations where a language model or a transcoder runs, and else in what a job goes through. It says
how much more one run does than another, not how long it takes: that is measured (`stages.cost_measured`).

| job | work |
|---|---|
| toyworld | 3 x forward pass x tokens of pretraining (the backward pass costs twice the forward pass) |
| tokenize | tokens |
| calibrate, a shard of cache | forward pass of the model or models x tokens |
| train | tokens x (`train_flops`, and what the model does beside it) |
| evaluate | forward passes and products of all encoders and decoders, as `stages.evaluate` makes them; no tasks |
| a block of features | tokens x product of its encoders, and a forward pass if activations are streamed |
| a block of interpret | features |
| a prompt of attribute | max_feature_nodes x forward pass |
| gathers, report | units; one |

A forward pass is `ModelShape.forward_flops`. Reading and writing files, loading a model and starting a job are not told
apart from work: where they count, a run that is measured should be like the one that is planned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.cache import CacheConfig
from circuitmill.config.train import TrainConfig
from circuitmill.pipeline import OPTIONAL_UPSTREAM
from circuitmill.stages.cost_models import ModelShape
from circuitmill.stages.cost_sizes import parameters, topology

SPLITS = ("train", "heldout")
_CORPUS_TOKENS = 16
"""Of a document of the embedded corpus, BOS included: about."""

Real = float | int
Work = Real | None
"""None where the text decides, of which nothing is known yet."""


@dataclass(frozen=True)
class Activity:
    """What a training settles on by itself."""

    l0: float
    """Features that fire on a token, per source; of top-k kinds the configuration says it."""
    few: float
    """Share of sources and steps that work with active features alone."""


@dataclass(frozen=True)
class Setting:
    """What decides how much the stages of one variant compute."""

    configs: Mapping[str, Any]
    """Stage -> its configuration, as far as it is known."""
    models: tuple[ModelShape, ...]
    """Whose activations are cached; none if their shapes are not known."""
    places: tuple[int, int]
    """Places at which activations are taken, and d_model; zeros if they are not known."""
    sequences: Mapping[str, int | None]
    """Split -> sequences of the token store; None if the text decides."""
    about: bool = False
    """Whether the numbers of sequences are an estimate."""
    activity: Activity | None = None

    @property
    def context(self) -> int:
        """Tokens in a sequence."""
        return int(self.configs["tokenize"].context)

    def tokens(self, split: str) -> int | None:
        """In the token store, BOS included."""
        sequences = self.sequences[split]
        return None if sequences is None else sequences * self.context

    def cached_sequences(self, split: str) -> int | None:
        """That the cache covers."""
        cached: CacheConfig = self.configs["cache"]
        budget = {"train": cached.train_tokens, "heldout": cached.heldout_tokens}[split]
        return self.sequences[split] if budget is None else -(-budget // self.context)

    def cached(self, split: str) -> int | None:
        """Tokens that the cache covers, BOS included, which it leaves out."""
        sequences = self.cached_sequences(split)
        return None if sequences is None else sequences * self.context

    def shards(self) -> dict[str, int | None]:
        """Tokens of each shard, BOS included."""
        cached: CacheConfig = self.configs["cache"]
        found: dict[str, int | None] = {}
        for name in cached.units():
            split, index = name.rsplit("-", 1)
            n_shards = {"train": cached.train_shards, "heldout": cached.heldout_shards}[split]
            wanted, number = self.cached_sequences(split), int(index)
            if wanted is None:
                found[name] = None
            else:
                found[name] = ((number + 1) * wanted // n_shards - number * wanted // n_shards) * self.context
        return found

    def limited(self, limit: int | None, there: int | None) -> int | None:
        """Tokens in whole sequences, at most so many."""
        if limit is None:
            return there
        whole = limit // self.context * self.context
        return whole if there is None else min(whole, there)

    def calibrated(self) -> int | None:
        """Tokens that stage calibrate looks at."""
        whole, there = -(-self.configs["calibrate"].tokens // self.context) * self.context, self.tokens("train")
        return whole if there is None else min(whole, there)

    def featured(self) -> dict[str, int | None]:
        """Tokens of each split in which every block of features is looked up."""
        own = self.configs["features"]
        limits = {"train": own.max_train_tokens, "heldout": own.max_heldout_tokens}
        return {split: self.limited(limits[split], self.cached(split)) for split in SPLITS}

    def evaluated(self) -> tuple[int | None, int | None]:
        """Held-out tokens of stage evaluate: in all, and for one layer at a time."""
        own, there = self.configs["evaluate"], self.tokens("heldout")
        whole = self.limited(own.max_tokens, there)
        return whole, self.limited(own.max_one_layer_tokens, whole)

    def forward(self) -> Work:
        """Operations for a token of all models whose activations are taken."""
        return sum(model.forward_flops(self.context) for model in self.models) if self.models else None


def corpus_sequences(documents: int, share: float, context: int) -> int:
    """About as many as a share of the embedded corpus makes."""
    return round(documents * share * _CORPUS_TOKENS) // context


def times(*factors: Work) -> Work:
    """Their product; None if one of them is not known."""
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def total(parts: list[Work]) -> Work:
    """Their sum; None if one of them is not known."""
    return None if None in parts else sum(part for part in parts if part is not None)


def unit_work(stage: str, setting: Setting) -> dict[str, Work]:
    """Work of every unit of a stage that fans out."""
    names = setting.configs[stage].units()
    if stage == "cache":
        return {name: times(tokens, setting.forward()) for name, tokens in setting.shards().items()}
    if stage == "features":
        return dict.fromkeys(names, _block(setting))
    if stage == "interpret":
        cfg, (n_layers, _) = setting.configs["train"], setting.places
        return dict.fromkeys(
            names, topology(cfg.architecture, n_layers).n_sources * cfg.n_features / max(1, len(names))
        )
    return dict.fromkeys(names, times(setting.configs[stage].max_feature_nodes, setting.forward()))


def stage_work(stage: str, setting: Setting) -> Work:
    """Work of a stage that is one job, or of the gather of one that fans out."""
    if stage == OPTIONAL_UPSTREAM:
        own = setting.configs[stage]
        return times(3, own.pretrain.tokens, setting.models[0].forward_flops(own.transformer.context))
    if stage == "tokenize":
        return total([setting.tokens(split) for split in SPLITS])
    if stage == "calibrate":
        return times(setting.calibrated(), setting.forward())
    if stage == "train":
        return _training(setting)
    if stage == "evaluate":
        return _evaluation(setting)
    units = getattr(setting.configs[stage], "units", tuple)()
    return float(max(1, len(units)))


def encoding(cfg: TrainConfig, n_layers: int, d_model: int) -> float:
    """Multiplications that find the pre-activations of a token."""
    return float(sum(map(len, topology(cfg.architecture, n_layers).reads)) * cfg.n_features * d_model)


@dataclass(frozen=True)
class Decoding:
    """Multiplications that make a token's reconstruction."""

    features: float
    """Of activations, if all are worked on."""
    dense: float = 0.0
    """Of what follows them, whichever are."""
    inputs: float = 0.0
    """Of what is read: a skip connection, and transforms before they are weighed."""

    @property
    def all(self) -> float:
        """Everything, if all activations are worked on."""
        return self.features + self.dense + self.inputs


def decoding(cfg: TrainConfig, n_layers: int, d_model: int, *, finished: bool = False) -> Decoding:
    """What decoders of an architecture multiply.

    Args:
        cfg: Of the training.
        n_layers: Places.
        d_model: Their width.
        finished: Whether decoders that targets share have their targets' scales by then.
    """
    form: ArchitectureConfig = cfg.architecture
    who = topology(form, n_layers)
    skip = float(n_layers * d_model**2) if form.skip else 0.0
    if form.topology == "molt":
        half = {each.name: each.numel for each in parameters(cfg, n_layers, d_model)}
        return Decoding(0.0, float(half["decoder.U"]), skip + half["decoder.V"])
    if form.decoder == "low_rank":
        outer = float(who.n_pairs * form.rank * d_model)
        return Decoding(float(who.n_sources * cfg.n_features * form.rank), outer, skip)
    alike = form.decoder == "source" and not (finished or form.pair_scale or form.pair_offset or cfg.base)
    return Decoding(float((who.n_sources if alike else who.n_pairs) * cfg.n_features * d_model), 0.0, skip)


def train_flops(cfg: TrainConfig, n_layers: int, d_model: int, activity: Activity) -> float:
    """Operations of a training for a token, forward and backward.

    With E multiplications of encoders and D of decoders, if all places are worked on: 4 E + 6 D (forward, and the
    gradients of weights; of D also those of activations). If active features alone are: 2 E to find them, and that in
    proportion to their share; counted by torch, and by hand in benchmarks/README.md, train_step.py. With an adapter E
    and D are only run forward, and the change is trained.

    The update of parameters is not in it, which costs as much per step however many tokens a step has, nor are terms
    of the loss and measurements.
    """
    share = min(1.0, (cfg.nonlinearity.k or activity.l0) / cfg.n_features)
    few = {"dense": 0.0, "sparse": 1.0}.get(cfg.products, activity.few)
    used = (1 - few) + few * share
    reads = encoding(cfg, n_layers, d_model)
    own = decoding(cfg, n_layers, d_model)
    if not cfg.adapter_rank:
        return 2 * few * reads + used * (4 * reads + 6 * own.features) + 6 * own.dense + 4 * own.inputs
    who = topology(cfg.architecture, n_layers)
    first, second = who.n_sources * cfg.n_features * cfg.adapter_rank, who.n_pairs * cfg.adapter_rank * d_model
    return 2 * (reads + used * own.features + own.dense + own.inputs) + 6 * used * first + 6 * second


def _training(setting: Setting) -> Work:
    cfg, cached = setting.configs["train"], setting.configs["cache"]
    if setting.activity is None or not all(setting.places):
        return None
    beside: list[Work] = [train_flops(cfg, *setting.places, setting.activity)]
    if cached.mode == "stream":
        beside.append(setting.forward())
    if cached.targets == "recomputed":
        beside.append(sum(2.0 * model.n_layers * model.mlp_numbers for model in setting.models) or None)
    if cfg.end_to_end:
        # the model as it is, the replacement model, and the gradients of what that computes
        beside.append(3 * setting.models[0].forward_flops(setting.context, logits=True) if setting.models else None)
    return times(cfg.steps * cfg.batch_tokens, total(beside))


def _evaluation(setting: Setting) -> Work:
    cfg, n_layers = setting.configs["train"], setting.places[0]
    whole, one_layer = setting.evaluated()
    if not setting.models or not n_layers:
        return None
    transcoder = 2 * (encoding(cfg, *setting.places) + decoding(cfg, *setting.places, finished=True).all)
    fit = times(whole, total([setting.forward(), transcoder]))
    if cfg.architecture.unreplaceable:
        return fit
    model = setting.models[0].forward_flops(setting.context, logits=True)
    # the model twice, with its MLPs replaced, and both ablations; the same for every layer by itself
    behaviour = times(whole, 5 * model + transcoder)
    single = times(one_layer, (2 + 3 * n_layers) * model + transcoder)
    return total([fit, behaviour, single])


def _block(setting: Setting) -> Work:
    cfg, own = setting.configs["train"], setting.configs["features"]
    parts: list[Work] = [2 * encoding(cfg, *setting.places) / own.blocks]
    if setting.configs["cache"].mode == "stream":
        parts.append(setting.forward())
    return times(total(list(setting.featured().values())), total(parts))
