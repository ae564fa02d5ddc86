"""What a run needs on disk, and whether it is there: for `circuitmill plan`, and the workflow before it starts jobs.

No torch here: the workflow asks while it reads its rules.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuitmill.config.cache import CacheConfig
from circuitmill.config.run import Run
from circuitmill.config.train import TrainConfig
from circuitmill.errors import UpstreamError
from circuitmill.pipeline import OPTIONAL_UPSTREAM
from circuitmill.stages import cost_sizes
from circuitmill.stages.cost_models import ModelShape, model_shape, n_places
from circuitmill.stages.cost_sizes import size
from circuitmill.stages.cost_work import SPLITS, Activity, Setting, corpus_sequences
from circuitmill.stores.manifest import NAME, Manifest, identity, read_manifest

STORING = ("tokenize", "cache", "train", "features")
"""Stages whose size is reckoned."""
NOT_COUNTED = "explanations, graphs, reports, logs and the embedded or downloaded language model"


@dataclass(frozen=True)
class Stored:
    """What a stage stores in one folder."""

    stage: str
    home: str
    """Variant in whose folder it lies; empty for the run's own."""
    bytes: int | None
    """Of all of it; None if the text or an unknown model decides."""
    left: int | None
    """Of them not there yet."""


@dataclass(frozen=True)
class Disk:
    """What a run needs and what there is."""

    stored: list[Stored]
    free: int
    """Bytes for what is not there yet."""
    where: str
    """Whose they are."""

    @property
    def bytes(self) -> int:
        """Of everything whose size is known."""
        return sum(each.bytes or 0 for each in self.stored)

    @property
    def left(self) -> int:
        """Of that, what is not there yet."""
        return sum(each.left or 0 for each in self.stored)

    @property
    def unknown(self) -> list[str]:
        """Stages whose size is not known."""
        return list(dict.fromkeys(each.stage for each in self.stored if each.bytes is None))

    @property
    def short(self) -> bool:
        """Whether it does not fit."""
        return self.left > self.free


def short_of_disk(run: Run, folder: Path) -> str | None:
    """A warning with what to change if a run needs more than is free where its results lie; None if it does not.

    What it has stored already counts as there. Stages of unknown size (a hub model that no table here has, before stage
    calibrate has seen it; text without a limit before stage tokenize) are taken as nothing.

    Args:
        run: The run.
        folder: results/<run>, which need not be there.
    """
    settings = settings_of(run, folder)
    disk = disk_of(run, settings, folder)
    return warning(run, settings, disk) if disk.short else None


def settings_of(
    run: Run,
    folder: Path,
    *,
    shape: ModelShape | None = None,
    places: tuple[int, int] | None = None,
    activities: Mapping[str, Activity | None] | None = None,
) -> dict[str, Setting]:
    """What decides how much the stages of each variant compute and store.

    Args:
        run: The run.
        folder: results/<run>. What stages tokenize and calibrate found there, they will not find otherwise.
        shape: Of a model that is not known.
        places: At which activations are taken, and d_model, if no model is known.
        activities: Of the variants' trainings.
    """
    return {
        variant: _setting(run, variant, folder, shape, places, (activities or {}).get(variant))
        for variant in run.variants
    }


def _setting(
    run: Run,
    variant: str,
    folder: Path,
    shape: ModelShape | None,
    given: tuple[int, int] | None,
    activity: Activity | None,
) -> Setting:
    configs = {name: run.config(name, variant) for name in run.stage_names()}
    cached, world = configs["cache"], configs.get(OPTIONAL_UPSTREAM)
    named = [model for model in (cached.model, cached.second_model) if model is not None]
    found = [shape or model_shape(model, world and world.transformer) for model in named]
    models = tuple(each for each in found if each is not None)
    models = models if len(models) == len(named) else ()
    places = (n_places(cached, models), models[0].d_model) if models else given or (0, 0)
    calibrated = _finished(run, "calibrate", run.home("calibrate", variant), folder)
    if not any(places) and calibrated is not None:
        places = calibrated.counts["n_layers"], calibrated.counts["d_model"]
    text, own = configs["tokenize"], _finished(run, "tokenize", run.home("tokenize", variant), folder)
    sequences: dict[str, int | None] = {
        split: None if limit is None else -(-limit // text.context)
        for split, limit in zip(SPLITS, (text.max_train_tokens, text.max_heldout_tokens), strict=True)
    }
    about = own is None and world is not None and text.source == OPTIONAL_UPSTREAM
    if own is not None:
        sequences = dict(own.counts["sequences"])
    elif about:
        sequences = _of_corpus(world, sequences, text.context)
    return Setting(configs, models, places, sequences, about, activity)


def _of_corpus(world: Any, limits: Mapping[str, int | None], context: int) -> dict[str, int | None]:
    """Sequences of the embedded corpus, about, as far as the limits go."""
    own, found = world.corpus, {}
    for split, share in zip(SPLITS, (1 - own.heldout_share, own.heldout_share), strict=True):
        there, limit = corpus_sequences(own.documents, share, context), limits[split]
        found[split] = there if limit is None else min(there, limit)
    return found


def _folder(folder: Path, home: str, stage: str) -> Path:
    return folder / home / stage if home else folder / stage


def _finished(run: Run, stage: str, home: str, folder: Path, unit: str = "") -> Manifest | None:
    """The manifest of a job that has been done with this configuration.

    One that cannot be read counts as missing: it says nothing, and whatever needs it will refuse it.
    """
    path = _folder(folder, home, stage)
    try:
        manifest, _ = read_manifest(path / unit / NAME if unit else path / NAME, stage)
    except UpstreamError:
        return None
    return manifest if manifest.config == identity(run.stages[stage][home]) else None


def disk_of(run: Run, settings: Mapping[str, Setting], folder: Path, limit: int | None = None) -> Disk:
    """What a run needs and what there is.

    Args:
        run: The run.
        settings: By variant.
        folder: results/<run>, which need not be there.
        limit: Bytes that the run may have in all; None for what is free on the disk of the folder.
    """
    stored = list(_stored(run, settings, folder))
    if limit is not None:
        return Disk(stored, limit - sum((each.bytes or 0) - (each.left or 0) for each in stored), "--disk")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Disk(stored, shutil.disk_usage(there).free, str(there))


def _stored(run: Run, settings: Mapping[str, Setting], folder: Path) -> Iterator[Stored]:
    for stage in STORING:
        for home in run.stages[stage]:
            setting = settings[home or run.variants[0]]
            size = size_of(stage, setting)
            if size is None or _finished(run, stage, home, folder):
                yield Stored(stage, home, size, None if size is None else 0)
            elif stage == "cache":
                yield Stored(stage, home, size, _shards_left(run, home, setting, folder))
            else:
                yield Stored(stage, home, size, max(0, size - _bytes_in(_folder(folder, home, stage))))


def size_of(stage: str, setting: Setting) -> int | None:
    """Bytes that a stage stores; None if the text or an unknown model decides."""
    cfg = setting.configs[stage]
    if stage == "tokenize":
        found = [setting.tokens(split) for split in SPLITS]
        return None if None in found else sum(filter(None, found)) * cost_sizes.of_token(cfg)
    if stage == "cache":
        if cfg.mode == "stream":
            return 0
        shards = list(setting.shards().values())
        if None in shards or not all(setting.places):
            return None
        return sum(filter(None, shards)) * cost_sizes.on_disk(cfg, *setting.places)
    if not all(setting.places):
        return None
    train: TrainConfig = setting.configs["train"]
    if stage == "train":
        return cost_sizes.train_bytes(train, *setting.places)
    who = cost_sizes.topology(train.architecture, setting.places[0])
    return who.n_sources * train.n_features * cost_sizes.of_feature(cfg)


def _shards_left(run: Run, home: str, setting: Setting, folder: Path) -> int:
    """Bytes of the shards that are not there; of an unfinished one, what it has written counts as there."""
    cfg: CacheConfig = setting.configs["cache"]
    each, left = cost_sizes.on_disk(cfg, *setting.places), 0
    shards = _folder(folder, home, "cache") / "shard"
    # one look at the folder instead of one at each of thousands
    begun = {path.name for path in shards.iterdir()} if shards.is_dir() else set()
    for name, tokens in setting.shards().items():
        whole = (tokens or 0) * each
        if name not in begun:
            left += whole
        elif not _finished(run, "cache", home, folder, unit=f"shard/{name}"):
            left += max(0, whole - _bytes_in(shards / name))
    return left


def _bytes_in(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            found += 0 if path.is_dir() else path.stat().st_size
        except FileNotFoundError:
            # a temporary file of a stage that runs
            continue
    return found


def warning(run: Run, settings: Mapping[str, Setting], disk: Disk) -> str:
    """What is short, and every single change that would be enough."""
    first = (
        f"{size(disk.left)} are still to be stored, {size(max(0, disk.free))} are free ({disk.where}): "
        f"{size(disk.left - disk.free)} too little."
    )
    found = list(_remedies(run, settings, disk.free + disk.bytes - disk.left))
    if found:
        return "\n  ".join([f"{first} Each of these would be enough:", *found])
    besides = sum(each.bytes or 0 for each in disk.stored if each.stage != "cache")
    return (
        f"{first} No codec and no mode of the cache is enough, for everything else takes {size(besides)}: free space, "
        "or lower tokenize.max_train_tokens, train.n_features or train.keep_checkpoints"
    )


def _remedies(run: Run, settings: Mapping[str, Setting], room: int) -> Iterator[str]:
    """Overrides with which all of a run takes no more than this; a variant's own would count more than them."""
    first = settings[run.variants[0]]
    cached: CacheConfig = first.configs["cache"]

    def common(stage: str, key: str) -> bool:
        return len({getattr(setting.configs[stage], key) for setting in settings.values()}) == 1

    def fits(*changes: tuple[str, Any]) -> Iterator[str]:
        total = sum(_sizes(run, {name: _changed(each, changes) for name, each in settings.items()}))
        if total <= room:
            yield " ".join(f"{key}={value}" for key, value in changes) + f" ({size(total)} in all)"

    codecs = [] if cached.mode == "stream" or not common("cache", "codec") else list(_smaller(cached, first.places))
    halves = cached.targets == "stored" and cached.mode == "disk" and common("cache", "targets")
    found = next((text for codec in codecs for text in fits(("cache.codec", codec))), "")
    both: list[str] = [*([found] if found else []), *(fits(("cache.targets", "recomputed")) if halves else [])]
    if not both and halves:
        both = [text for codec in codecs for text in fits(("cache.targets", "recomputed"), ("cache.codec", codec))][:1]
    yield from both
    if cached.mode == "disk" and common("cache", "mode"):
        yield from fits(("cache.mode", "stream"))
    if common("train", "keep_checkpoints") and first.configs["train"].keep_checkpoints > 1:
        yield from fits(("train.keep_checkpoints", 1))


def _smaller(cached: CacheConfig, places: tuple[int, int]) -> Iterator[str]:
    """Codecs that make a smaller cache, the finest first."""
    sizes = {
        name: cost_sizes.on_disk(replace(cached, codec=name), *places)
        for name in cost_sizes.CODECS
        if not cost_sizes.codec_problem(name, places[1], cached.group_channels)
    }
    own = cost_sizes.on_disk(cached, *places)
    yield from sorted((name for name in sizes if sizes[name] < own), key=lambda name: -sizes[name])


def _changed(setting: Setting, changes: tuple[tuple[str, Any], ...]) -> Setting:
    configs = dict(setting.configs)
    for key, value in changes:
        stage, option = key.split(".")
        configs[stage] = replace(configs[stage], **{option: value})
    return replace(setting, configs=configs)


def _sizes(run: Run, settings: Mapping[str, Setting]) -> Iterator[int]:
    for stage in STORING:
        for home in run.stages[stage]:
            yield size_of(stage, settings[home or run.variants[0]]) or 0
