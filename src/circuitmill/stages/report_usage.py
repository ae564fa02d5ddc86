"""What a run took, and what had been expected: glue around `stores.usage` for stage report and command `usage`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.errors import StoreError
from circuitmill.stages.train_plan import situation_of
from circuitmill.stores.benchmarks import read_benchmarks
from circuitmill.stores.manifest import NAME, Manifest, load_manifest
from circuitmill.stores.metrics import METRICS, read_metrics
from circuitmill.stores.places import folders
from circuitmill.stores.usage import Prediction, RunUsage, by_rule, by_stage, jobs_of
from circuitmill.training.parallel.census import Shape
from circuitmill.training.parallel.plan import estimates

BENCHMARKS = "benchmarks"
"""Beside the stages' folders in that of a run."""


def usage_of(run: Path, manifests: Sequence[Manifest], benchmarks: Path | None) -> RunUsage:
    """What some stages and units of a run took.

    Args:
        run: Its folder, results/<run>.
        manifests: Of those stages and units.
        benchmarks: Folder of Snakemake's benchmark files of the run; None if there is none.

    Raises:
        StoreError: a benchmark file is damaged, or the folder is missing.
    """
    records = [] if benchmarks is None else read_benchmarks(benchmarks)
    jobs = jobs_of(run, manifests, records)
    return RunUsage(
        run=run.resolve().name,
        stages=tuple(by_stage(jobs, manifests)),
        rules=tuple(by_rule(jobs)),
        predictions=tuple(predictions(run, manifests)),
        benchmarks=benchmarks is not None,
    )


def usage_of_run(run: Path) -> RunUsage:
    """What everything finished in a run took.

    Args:
        run: Its folder, results/<run>.

    Raises:
        StoreError: nothing is finished there, or a benchmark file is damaged.
        UpstreamError: a manifest is damaged, of another revision, or a file that it lists is missing.
    """
    if not run.is_dir():
        raise StoreError("the folder of a run", found="no such folder", where=run, fix="name results/<run>")
    found = [folder / NAME for folder in folders(run) if (folder / NAME).exists()]
    if not found:
        raise StoreError("a finished stage", found="no manifest.json", where=run, fix="name results/<run>")
    benchmarks = run / BENCHMARKS
    return usage_of(run, [load_manifest(path) for path in found], benchmarks if benchmarks.is_dir() else None)


def predictions(run: Path, manifests: Sequence[Manifest]) -> Iterator[Prediction]:
    """What `circuitmill plan` says of finished trainings and the caches that they read, and what they came to.

    Nothing of a training that several ranks shared: how they did depends on what memory each of them had.
    """
    caches = {one.digest: one for one in manifests if one.stage == "cache" and one.unit is None}
    seen = set()
    for train in (one for one in manifests if one.stage == "train" and one.inputs["cache"] in caches):
        cache = caches[train.inputs["cache"]]
        cfg, cached = decode(TrainConfig, train.config, "train"), decode(CacheConfig, cache.config, "cache")
        shape, tokens = Shape(cache.counts["n_layers"], cache.counts["d_model"]), sum(cache.counts["tokens"].values())
        device = "cpu" if train.device in ("", "cpu") else "cuda"
        situation = situation_of(cfg, cached, shape, device, tokens)
        # codes of entropy have no size before they are made
        if cache.digest not in seen and cached.mode == "disk" and cached.codec != "entropy" and situation.stored:
            shards = [one for one in manifests if one.unit and one.folder.parent.parent == cache.folder]
            size = sum(entry["bytes"] for one in (cache, *shards) for entry in one.files.values())
            yield Prediction(
                f"{_name(run, cache)}: codes and scales on disk", tokens * situation.stored.token_bytes, size
            )
            seen.add(cache.digest)
        used = read_metrics(train.file(METRICS))[-1].get("peak_memory_bytes")
        if train.ranks == 1 and used is not None:
            [single, *_] = estimates(cfg, shape, 1, 0, situation)
            # on a GPU only tensors are counted, on a CPU the whole process
            need = single.total if device == "cpu" or single.memory is None else single.memory.peak
            yield Prediction(
                f"{_name(run, train)}: memory of the {'process' if device == 'cpu' else 'GPU'}", need, used
            )


def _name(run: Path, manifest: Manifest) -> str:
    """The stage, and the variant whose folder it lies in."""
    home = manifest.folder.resolve().parent
    return manifest.stage if home == run.resolve() else f"{manifest.stage} of {home.name}"
