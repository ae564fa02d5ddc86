"""Bytes of what a run stores, by arithmetic on its configuration alone. No torch here.

The codecs' arrays, the transcoder's parameters and what an optimizer keeps of them are written down once more; tests
compare them with `core.codecs`, `training.parallel.census` and `training.parallel.memory`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.cache import CacheConfig
from circuitmill.config.features import FeaturesConfig
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.config.train import TrainConfig
from circuitmill.core.topology import Topology, make_topology

CODECS = ("float32", "bf16", "int8", "int4", "int2", "entropy")
"""Finest first, but for entropy, which has any size."""
_BITS = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2, "entropy": 8}
"""Of a code; `entropy` before its entropy coder."""
_WITHOUT_SCALES = ("float32", "bf16")
PROVENANCE = 16
"""Bytes that a cache keeps of where a token is from, before compression: to about a third on disk."""
_TOKEN, _TEXT = 4, 4
"""Bytes of a token's number, and about those of its text, before compression."""
_WINDOW_TOKEN, _FEATURE = 8, 1_000
"""Bytes of a token of a window (its number and an activation), and about those of a feature's statistics."""
_FLOAT, _HALF = 4, 2
_COUNTERS = 12
"""Bytes of a checkpoint for each feature: how long ago it fired, and its density."""
_ADAM8 = 2 * (1 + _FLOAT / 256)
_ADAM8_LEAST = 4096


def size(n_bytes: float | int) -> str:
    """In units of a thousand.

    >>> size(79_500_000_000), size(1_500), size(0)
    ('79.5 GB', '1.5 kB', '0 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def codec_problem(codec: str, d_model: int, group_channels: int) -> str:
    """Why activations of this width cannot be stored so; empty if they can."""
    if codec in _WITHOUT_SCALES:
        return ""
    if d_model % min(group_channels, d_model):
        return f"a divisor of d_model ({d_model})"
    per_byte = 8 // _BITS[codec]
    return f"a d_model that is a multiple of {per_byte} for codec {codec}" if d_model % per_byte else ""


def sides(cached: CacheConfig) -> int:
    """What is stored of a place: what is read, and with it what is written."""
    return 2 if cached.targets == "stored" else 1


def in_memory(cached: CacheConfig, n_layers: int, d_model: int) -> int:
    """Bytes of a token in the form that its codec gives it, before what is compressed; provenance apart."""
    codes = d_model * _BITS[cached.codec] // 8
    scales = 0 if cached.codec in _WITHOUT_SCALES else d_model // min(cached.group_channels, d_model)
    return sides(cached) * n_layers * (codes + scales)


def on_disk(cached: CacheConfig, n_layers: int, d_model: int) -> int:
    """Bytes of a token on disk, before any compression that is asked for.

    Codes of entropy have the bits that they are made for; their shifts are nearly all zero and vanish.
    """
    if cached.codec == "entropy":
        return math.ceil(sides(cached) * n_layers * d_model * cached.bits / 8) + PROVENANCE
    return in_memory(cached, n_layers, d_model) + PROVENANCE


def of_token(cfg: TokenizeConfig) -> int:
    """Bytes of a token in the token store, about, with its text if that is kept, before compression."""
    return _TOKEN + (_TEXT if cfg.keep_text else 0)


def of_feature(cfg: FeaturesConfig) -> int:
    """Bytes of a feature's windows and statistics, at most about, before compression."""
    windows = 2 * (cfg.top_windows + cfg.quantile_windows + cfg.silent_windows)
    return windows * cfg.window * _WINDOW_TOKEN + _FEATURE


@dataclass(frozen=True)
class Numbers:
    """A parameter of a transcoder."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether it is a stack of matrices, which optimizers and precisions treat in their own way."""
        return len(self.shape) == 3


def topology(form: ArchitectureConfig, n_layers: int) -> Topology:
    """Who reads and writes which of so many places."""
    return make_topology(form.topology, n_layers)


def parameters(cfg: TrainConfig, n_layers: int, d_model: int) -> list[Numbers]:
    """Parameters of a transcoder while it is trained."""
    form = cfg.architecture
    if cfg.base and form.decoder == "source":
        # a finished transcoder of this form has factors, which hold the scales that were folded in
        form = replace(form, pair_scale=True)
    found = _parameters(form, cfg.n_features, n_layers, d_model)
    if cfg.adapter_rank:
        found = [replace(each, name=each.name.replace("decoder.", "decoder.base."), trained=False) for each in found]
        change = _low_rank(topology(form, n_layers), cfg.n_features, d_model, cfg.adapter_rank)
        return found + [replace(each, name=f"decoder.change.{each.name}") for each in change]
    learned = cfg.nonlinearity.name == "jumprelu"
    return [replace(each, trained=learned or each.name != "log_threshold") for each in found]


def _parameters(form: ArchitectureConfig, n_features: int, n_layers: int, d_model: int) -> list[Numbers]:
    """As `core.transcoder` has them."""
    who = topology(form, n_layers)
    found = [
        Numbers("W_enc", (sum(map(len, who.reads)), n_features, d_model)),
        Numbers("b_enc", (who.n_sources, n_features)),
        Numbers("b_dec", (n_layers, d_model)),
        Numbers("log_threshold", (who.n_sources, n_features)),
    ]
    if form.skip:
        found.append(Numbers("W_skip", (n_layers, d_model, d_model)))
    decoders = _decoders(form, who, n_features, d_model)
    return found + [replace(each, name=f"decoder.{each.name}") for each in decoders]


def _low_rank(who: Topology, n_features: int, d_model: int, rank: int) -> list[Numbers]:
    return [Numbers("Q", (who.n_sources, n_features, rank)), Numbers("P", (who.n_pairs, rank, d_model))]


def _decoders(form: ArchitectureConfig, who: Topology, n_features: int, d_model: int) -> Iterator[Numbers]:
    """As `core.decoders` and `core.mixture` have them."""
    if form.topology == "molt":
        unit = n_features // (2 ** len(form.ranks) - 1)
        rows = sum(unit * 2**index * rank for index, rank in enumerate(form.ranks))
        yield from (Numbers(name, (who.n_layers, rows, d_model)) for name in ("U", "V"))
    elif form.decoder == "low_rank":
        yield from _low_rank(who, n_features, d_model, form.rank)
    elif form.decoder == "untied":
        for source, writes in enumerate(who.writes):
            yield Numbers(f"W_dec.{source}", (n_features - form.shared, len(writes), d_model))
        if form.shared:
            yield Numbers("W_shared", (form.shared, who.n_layers // form.models, d_model))
    else:
        yield Numbers("W_dec", (who.n_layers if form.decoder == "target" else who.n_sources, n_features, d_model))
        for name in ("pair_scale", "pair_offset"):
            if getattr(form, name):
                yield Numbers(name, (who.n_pairs, n_features))


def optimizer_bytes(one: Numbers, cfg: TrainConfig) -> int:
    """Of what an optimizer keeps of a parameter, as `training.parallel.memory` counts it."""
    own = cfg.optimizer
    if not one.trained:
        return 0
    if own.name == "adam8bit" and one.numel >= _ADAM8_LEAST and one.numel % 256 == 0:
        return round(_ADAM8 * one.numel)
    if own.name == "muon" and one.matrix:
        return _FLOAT * one.numel
    moment = _HALF if own.moments == "bf16" and one.matrix else _FLOAT
    return 2 * moment * one.numel


def checkpoint_bytes(cfg: TrainConfig, n_layers: int, d_model: int) -> int:
    """Of one checkpoint: what is trained, what the optimizer keeps of it, and counters.

    Where something else is evaluated than trained, both are in it: averages of schedule_free, rows that wait with lazy.
    """
    own, size = cfg.optimizer, 0
    for each in parameters(cfg, n_layers, d_model):
        if not each.trained:
            continue
        small = own.precision == "bf16" and each.matrix
        # of a lazy optimizer decoders wait, and numbers by row say since when
        waits = own.lazy and each.matrix and each.name.startswith("decoder.")
        copies = 2 if own.name == "schedule_free" or waits else 1
        size += copies * (_HALF if small else _FLOAT) * each.numel + optimizer_bytes(each, cfg)
    return size + _COUNTERS * topology(cfg.architecture, n_layers).n_sources * cfg.n_features


def transcoder_bytes(cfg: TrainConfig, n_layers: int, d_model: int) -> int:
    """Of the finished transcoder in float32, with its copy for circuit-tracer if it is of another form."""
    form = _finished(cfg)
    forms = [form]
    if not form.untraceable and replace(form, prefixes=()) != ArchitectureConfig():
        forms.append(ArchitectureConfig())
    found = [_parameters(each, cfg.n_features, n_layers, d_model) for each in forms]
    return _FLOAT * sum(each.numel for numbers in found for each in numbers)


def _finished(cfg: TrainConfig) -> ArchitectureConfig:
    """What a transcoder is when an adapter is merged and scales are folded in."""
    form = cfg.architecture
    if cfg.adapter_rank and form.decoder == "low_rank":
        form = replace(form, rank=form.rank + cfg.adapter_rank)
    elif cfg.adapter_rank:
        form = replace(form, decoder="untied", pair_scale=False)
    # a source's decoders get factors that hold the scales of its targets; models no longer share any
    return replace(form, shared=0, pair_scale=form.pair_scale or form.decoder == "source")


def train_bytes(cfg: TrainConfig, n_layers: int, d_model: int) -> int:
    """Of a training's folder when most is in it.

    That are the newest checkpoints, those of checkpoint_l0 (all are taken to be made), and one that is being written
    before the oldest goes, or else the finished transcoder.
    """
    each, final = checkpoint_bytes(cfg, n_layers, d_model), transcoder_bytes(cfg, n_layers, d_model)
    return (cfg.keep_checkpoints + len(cfg.checkpoint_l0)) * each + max(each, final)
