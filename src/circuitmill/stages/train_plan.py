"""What a training needs, before anything is started: command `plan`. Glue around `training.parallel.plan`.

The shape of the activations comes from a finished cache, from what the caller says, or from what `cost_models` knows of
language models. No model is loaded and nothing is fetched. What the whole run costs is in `cost_plan`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.model import ModelConfig
from circuitmill.config.run import Run
from circuitmill.config.train import OVER_TOKENS, TrainConfig
from circuitmill.errors import ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM
from circuitmill.stages import cost_sizes
from circuitmill.stages.cost_models import MODELS, ModelShape, model_shape, n_places
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.training.parallel.census import Shape, count
from circuitmill.training.parallel.payload import Stored
from circuitmill.training.parallel.plan import Estimate, Situation, estimates, propose

LEAST_TOKENS = 64
"""Of a micro-batch: smaller ones leave a processor idle."""
_MOST_RANKS = 1024
_GB = 1_000_000_000


@dataclass(frozen=True)
class Machine:
    """Ranks, and what each one has."""

    device: Literal["cuda", "cpu"]
    ranks: int
    memory_bytes: int
    """Of a rank."""
    disk_bytes: int = 0
    """For the run; 0 if nothing is said about it."""


@dataclass(frozen=True)
class CodecSize:
    """What a codec makes of the cache."""

    codec: str
    problem: str = ""
    """Why the activations cannot be stored so; then the rest is zero."""
    token_bytes: int = 0
    """On disk, before any compression that is asked for; codes of entropy at the bits that they are made for."""
    cache_bytes: int = 0
    """Of all cached tokens; 0 if their number is open."""
    step_bytes: int = 0
    """Read by a rank in a step: ranks read all tokens and keep their rows."""


@dataclass(frozen=True)
class Plan:
    """All that the command prints."""

    run: str
    variant: str
    machine: Machine
    shape: Shape
    shape_from: str
    parameters: dict[str, int]
    cfg: TrainConfig
    """With the micro-batches that are proposed."""
    micro_batches: int
    """Of the configuration."""
    estimates: list[Estimate]
    proposal: Estimate
    cached_tokens: int
    codecs: list[CodecSize]
    codec: str
    """Proposed; empty if the cache is there, or if activations are streamed."""
    room: int | None
    """Bytes that the disk has for the cache; None if nothing is said about it."""
    remedies: list[str]
    notes: list[str]

    @property
    def overrides(self) -> list[str]:
        """To be added to a command."""
        chosen = self.proposal
        found = [f"train.parallel.strategy={chosen.strategy}"]
        if chosen.strategy == "mesh":
            found.append(f"train.parallel.feature_ranks={chosen.feature_ranks}")
        found.append(f"train.optimizer.micro_batches={chosen.micro_batches}")
        return [*found, f"cache.codec={self.codec}"] if self.codec else found


def machine(*, gpus: int, gpu_memory: float, cpus: int, memory: float | None, disk: float) -> Machine:
    """From what the command line says; sizes in 10^9 bytes.

    Args:
        gpus: Ranks with a GPU; 0 for ranks on CPUs.
        gpu_memory: Of each.
        cpus: Ranks without.
        memory: Of the machine, which these share; None for what this one has.
        disk: For the run; 0 if nothing is said about it.

    Raises:
        ConfigError: a number that makes no sense.
    """
    ranks, each = gpus or cpus, gpu_memory
    for name, value in (("--gpus or --cpu", ranks), ("--gpu-memory", each), ("--memory", memory), ("--disk", disk + 1)):
        if (value is not None and value <= 0) or gpus < 0:
            raise ConfigError("a number above 0", found=value, where=name, fix="correct the value")
    if gpus:
        return Machine("cuda", ranks, round(each * _GB), round(disk * _GB))
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", ranks, (here if memory is None else round(memory * _GB)) // ranks, round(disk * _GB))


def make_plan(
    run: Run,
    machine: Machine,
    *,
    variant: str = "",
    cache: Path | None = None,
    shape: ModelShape | None = None,
    besides: int = 0,
) -> Plan:
    """Plan a training of a run.

    Args:
        run: The run.
        machine: What there is.
        variant: Of the run; the first if empty.
        cache: manifest.json of a finished cache, which says what the activations are and how many there are.
        shape: Of the language model.
        besides: Bytes on disk of all that the run stores but this cache.

    Raises:
        ConfigError: there is no such variant, the model's shape is unknown, or no strategy is possible.
        UpstreamError: the cache is missing or incomplete.
    """
    variant = variant or run.variants[0]
    cfg: TrainConfig = run.config("train", variant)
    manifest = None if cache is None else load_manifest(cache, "cache")
    cached = run.config("cache", variant) if manifest is None else decode(CacheConfig, manifest.config, "cache")
    found, source = _shape(run, variant, cached, manifest, shape)
    tokens = _cached_tokens(run, variant, cached, manifest)
    names = cost_sizes.CODECS if cached.mode == "disk" else ()
    codecs = [_codec_size(name, cfg, cached, found, tokens) for name in names]
    room = max(0, machine.disk_bytes - besides) if machine.disk_bytes else None
    codec = "" if manifest is not None or not codecs else _codec(codecs, cached, room)
    stored = replace(cached, codec=codec) if codec else cached
    situation = situation_of(cfg, stored, found, machine.device, tokens)
    chosen, proposal = _fitting(cfg, found, machine, situation)
    return Plan(
        run.name,
        variant,
        machine,
        found,
        source,
        count(chosen, found).by_kind(),
        chosen,
        cfg.optimizer.micro_batches,
        estimates(chosen, found, machine.ranks, machine.memory_bytes, situation),
        proposal,
        tokens,
        codecs,
        codec,
        room,
        [] if proposal.fits else list(_remedies(chosen, found, machine, situation, proposal)),
        list(_notes(cfg, chosen, cached)),
    )


def _shape(
    run: Run, variant: str, cached: CacheConfig, manifest: Manifest | None, given: ModelShape | None
) -> tuple[Shape, str]:
    """Of the activations, and where it is from."""
    if manifest is not None:
        return Shape(manifest.counts["n_layers"], manifest.counts["d_model"]), "the cache"
    models = [model for model in (cached.model, cached.second_model) if model is not None]
    shapes = [given or _model_shape(run, variant, model) for model in models]
    return Shape(n_places(cached, shapes), shapes[0].d_model), "--shape" if given else "the model"


def _model_shape(run: Run, variant: str, model: ModelConfig) -> ModelShape:
    world = run.config(OPTIONAL_UPSTREAM, variant) if run.has_toyworld else None
    found = model_shape(model, world and world.transformer)
    if found is None:
        raise ConfigError(
            f"a model whose shape is known: {', '.join(MODELS)}",
            found=model.name,
            where="model.name",
            fix="pass --shape LAYERSxWIDTH (num_hidden_layers and hidden_size of its config.json), or --cache MANIFEST",
        )
    return found


def _cached_tokens(run: Run, variant: str, cached: CacheConfig, manifest: Manifest | None) -> int:
    """Of both splits, BOS included unless the cache is there; 0 if the text decides."""
    if manifest is not None:
        return sum(manifest.counts["tokens"].values())
    text = run.config("tokenize", variant)
    found = [
        own if own is not None else limit
        for own, limit in (
            (cached.train_tokens, text.max_train_tokens),
            (cached.heldout_tokens, text.max_heldout_tokens),
        )
    ]
    return sum(number for number in found if number is not None) if found[0] is not None else 0


def _codec_size(name: str, cfg: TrainConfig, cached: CacheConfig, shape: Shape, tokens: int) -> CodecSize:
    problem = cost_sizes.codec_problem(name, shape.d_model, cached.group_channels)
    if problem:
        return CodecSize(name, problem=problem)
    size = cost_sizes.on_disk(replace(cached, codec=name), shape.n_layers, shape.d_model)
    return CodecSize(name, "", size, size * tokens, size * cfg.batch_tokens)


def _codec(codecs: list[CodecSize], cached: CacheConfig, room: int | None) -> str:
    """The configured one, or if that does not go onto the disk the next finer one that does."""
    usable = [each for each in codecs if not each.problem]
    own = next((each for each in usable if each.codec == cached.codec), None)
    if own is None:
        raise ConfigError(
            "a codec that can store these activations: " + ", ".join(each.codec for each in usable),
            found=cached.codec,
            where="cache.codec",
            fix="choose one of them",
        )
    if room is None or own.cache_bytes <= room:
        return own.codec
    smaller = [each for each in usable if each.cache_bytes <= room]
    return max(smaller, key=lambda each: each.token_bytes).codec if smaller else own.codec


def situation_of(cfg: TrainConfig, cached: CacheConfig, shape: Shape, device: str, tokens: int = 0) -> Situation:
    """What a training's data adds to what a rank needs.

    Args:
        cfg: Of the training.
        cached: Of the cache that it reads.
        shape: Of the activations.
        device: cuda or cpu.
        tokens: In the cache; 0 if it is not known, then as many as a pool has.
    """
    if cached.mode == "stream":
        models = [model for model in (cached.model, cached.second_model) if model is not None]
        name = "bf16" if all(model.dtype == "bfloat16" for model in models) else "float32"
    else:
        name = cached.codec
    size = cost_sizes.in_memory(replace(cached, codec=name), shape.n_layers, shape.d_model)
    pool = min(cfg.pool_tokens, tokens) if tokens else cfg.pool_tokens
    # one in use, one being read, and the batch that comes next
    pools = (2 * pool + cfg.batch_tokens) * size
    return Situation("cuda" if device == "cuda" else "cpu", Stored(size, cached.targets == "recomputed"), pools)


def _fitting(cfg: TrainConfig, shape: Shape, machine: Machine, situation: Situation) -> tuple[TrainConfig, Estimate]:
    """The proposal, with as few micro-batches as let it fit; of those configured if none does."""
    own = cfg.optimizer.micro_batches
    first = propose(cfg, shape, machine.ranks, machine.memory_bytes, situation)
    if first.fits:
        return cfg, first
    best = (cfg, first)
    parts = own * 2
    while cfg.batch_tokens // parts >= LEAST_TOKENS:
        finer = replace(cfg, optimizer=replace(cfg.optimizer, micro_batches=parts))
        if all(each.impossible for each in estimates(finer, shape, machine.ranks, machine.memory_bytes, situation)):
            break
        found = propose(finer, shape, machine.ranks, machine.memory_bytes, situation)
        if found.fits:
            return finer, found
        if found.total < best[1].total:
            best = (finer, found)
        parts *= 2
    return best


def _remedies(
    cfg: TrainConfig, shape: Shape, machine: Machine, situation: Situation, proposal: Estimate
) -> Iterator[str]:
    """What would make it fit, one thing at a time."""
    what = "GPUs" if machine.device == "cuda" else "ranks"
    yield f"{what} with {proposal.total / 1e9:.1f} GB each instead of {machine.memory_bytes / 1e9:.1f} GB"
    ranks = 2 * machine.ranks
    while machine.device == "cuda" and ranks <= min(_MOST_RANKS, cfg.batch_tokens):
        more = replace(machine, ranks=ranks)
        possible = any(not each.impossible for each in estimates(cfg, shape, ranks, machine.memory_bytes, situation))
        if possible and _fitting(cfg, shape, more, situation)[1].fits:
            yield f"{ranks} {what} of {machine.memory_bytes / 1e9:.1f} GB"
            break
        ranks *= 2
    if cfg.optimizer.precision != "bf16" and cfg.optimizer.name != "schedule_free":
        smaller = replace(cfg, optimizer=replace(cfg.optimizer, precision="bf16"))
        if _would_fit(smaller, shape, machine, situation):
            yield "train.optimizer.precision=bf16"
    if not (cfg.architecture.prefixes or cfg.architecture.ranks or cfg.architecture.shared):
        n_features = cfg.n_features // 2
        while n_features > max(cfg.init.l0, cfg.nonlinearity.k, 64):
            if _would_fit(replace(cfg, n_features=n_features), shape, machine, situation):
                yield f"train.n_features={n_features}"
                break
            n_features //= 2


def _would_fit(cfg: TrainConfig, shape: Shape, machine: Machine, situation: Situation) -> bool:
    found = estimates(cfg, shape, machine.ranks, machine.memory_bytes, situation)
    return any(not each.impossible for each in found) and _fitting(cfg, shape, machine, situation)[1].fits


def _notes(cfg: TrainConfig, chosen: TrainConfig, cached: CacheConfig) -> Iterator[str]:
    """What the figures leave out or take for granted."""
    if cfg.end_to_end:
        yield "the language model, which takes part in the loss, and what its own gradients keep are not counted"
    if cached.targets == "recomputed":
        yield "the language model's MLPs, which compute the outputs on every rank, are not counted"
    if cached.mode == "stream":
        yield "the language model, which every rank runs beside the training, is not counted"
    if chosen.optimizer.micro_batches != cfg.optimizer.micro_batches and cfg.nonlinearity.name in OVER_TOKENS:
        yield f"{cfg.nonlinearity.name} ranks within each micro-batch: with more of them the result is another one"
