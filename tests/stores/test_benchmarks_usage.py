"""Usage of a run: what is taken from where, sums, and requests that are far from what was used."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from circuitmill.stores.benchmarks import JobRecord, Requested
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.timing import TIMING
from circuitmill.stores.usage import Job, Suggestion, Usage, by_rule, by_stage, jobs_of, suggestions
from circuitmill.viz import usage_view

GB = 1_000_000_000
ASKED = Requested(4 * GB, 3600, 1, 0)


@dataclass(frozen=True)
class Config:
    size: int = 1


def finished(run: Path, place: str, **timing: object) -> Manifest:
    """A stage or unit with 8 bytes of data, and what it noted of itself."""
    parts = place.split("/")
    unit = parts[-1] if parts[-2:-1] in (["shard"], ["block"], ["prompt"]) else None
    stage = parts[-3] if unit else parts[-1]
    output = StageOutput(stage, Config(), {}, run / place, unit=unit, keep=("shard", "block", "prompt"))
    output.path("data.bin").write_bytes(b"12345678")
    output.finish({})
    path = run / place / TIMING
    noted = {"wall_seconds": 8.0, "peak_memory_bytes": 100, "cpu_seconds": 6.0, "device": "cpu", "ranks": 1}
    path.write_text(json.dumps(noted | timing))
    return load_manifest(run / place / "manifest.json")


def record(place: str, seconds: float = 10.0, **more: object) -> JobRecord:
    stage = "cache" if place.startswith("cache") else place.split("/")[1]
    rule = f"{stage}_shard" if "/shard/" in place else f"run_{stage}"
    base = JobRecord(place, stage, rule, seconds, cpu_seconds=9.0, peak_bytes=300, requested=ASKED)
    return replace(base, **more)


def test_time_is_snakemakes_and_memory_the_larger(tmp_path: Path):
    one, two = finished(tmp_path, "cache"), finished(tmp_path, "main/train", peak_memory_bytes=500, cpu_seconds=9.5)
    cache, train = jobs_of(tmp_path, [two, one], [record("main/train"), record("cache")])
    assert (cache.seconds, cache.cpu_seconds, cache.peak_bytes) == (10.0, 9.0, 300)
    assert (train.seconds, train.cpu_seconds, train.peak_bytes) == (10.0, 9.5, 500)
    assert cache.benchmarked and cache.requested == ASKED and (cache.gpus, train.rule) == (0, "run_train")


def test_without_a_benchmark_it_is_what_the_stage_noted(tmp_path: Path):
    made = finished(tmp_path, "main/train", device="NVIDIA H200", ranks=4, continued=True)
    (job,) = jobs_of(tmp_path, [made], [])
    assert not job.benchmarked and job.requested is None and job.rule == "run_train"
    assert (job.seconds, job.cpu_seconds, job.peak_bytes, job.gpus) == (8.0, 6.0, 100, 4)
    assert not job.seen and job.continued
    (tmp_path / "main/train" / TIMING).unlink()
    (job,) = jobs_of(tmp_path, [load_manifest(tmp_path / "main/train/manifest.json")], [])
    assert (job.seconds, job.cpu_seconds, job.peak_bytes, job.gpus) == (None, None, None, None)


def test_a_job_of_several_units_stands_for_all_of_them(tmp_path: Path):
    names = [f"train-0000{n}" for n in range(3)] + ["train-00010", "heldout-00000"]
    made = [finished(tmp_path, f"cache/shard/{name}", peak_memory_bytes=1000 + n) for n, name in enumerate(names)]
    records = [record("cache/shard/train-0000", 100.0), record("cache/shard/train-00010")]
    jobs = jobs_of(tmp_path, made, records)
    assert [(job.place, job.benchmarked) for job in jobs] == [
        ("cache/shard/heldout-00000", False),
        ("cache/shard/train-0000", True),
        ("cache/shard/train-00010", True),
    ]
    assert (jobs[1].seconds, jobs[1].cpu_seconds, jobs[1].peak_bytes) == (100.0, 18.0, 1002)
    (cache,) = by_stage(jobs, made)
    assert (cache.seconds, cache.bytes) == (118.0, 5 * 8)


def test_files_of_another_configuration_or_of_an_earlier_job_say_nothing(tmp_path: Path):
    made = finished(tmp_path, "main/train", wall_seconds=50.0)
    (job,) = jobs_of(tmp_path, [made], [record("main/train", 20.0), record("cache/shard/train-00007")])
    assert (job.benchmarked, job.seconds) == (False, 50.0)


def test_sums_go_over_what_is_known():
    def job(**more: object) -> Job:
        return replace(Job("cache", "cache", "run_cache", True, 10.0, 5.0, 300, ASKED, 2), **more)

    usage = Usage("cache", (job(), job(seconds=None), job(seconds=3600.0, cpu_seconds=None, peak_bytes=900, gpus=4)))
    assert (usage.seconds, usage.cpu_seconds, usage.gpu_seconds) == (3610.0, 10.0, None)
    assert (usage.longest.seconds, usage.largest.peak_bytes) == (3600.0, 900)
    assert Usage("cache", (job(), job(seconds=3600.0, gpus=4))).gpu_seconds == 20 + 4 * 3600
    nothing = Usage("cache", (job(seconds=None, cpu_seconds=None, peak_bytes=None),))
    assert (nothing.seconds, nothing.cpu_seconds, nothing.longest, nothing.largest) == (None,) * 4


def suggested(*jobs: Job) -> list[Suggestion]:
    return suggestions(by_rule(jobs))


def shard(seconds: float = 1500.0, peak: float = 1.5, cpu: float = 1400.0, asked: Requested = ASKED, **more) -> Job:
    base = Job("cache/shard/a", "cache", "cache_shard", True, seconds, cpu, round(peak * GB), asked, 0)
    return replace(base, **more)


@pytest.mark.parametrize(
    ("jobs", "line"),
    [
        ([shard(peak=0.4), shard(peak=0.91)], "asks 4000 MB, used at most 910 MB in 2 jobs. Would do: {mem_mb: 1800}"),
        ([shard(peak=0.1)], "asks 4000 MB, used at most 100 MB in 1 job. Would do: {mem_mb: 1000}"),
        ([shard(peak=3.7)], "asks 4000 MB, used at most 3700 MB in 1 job. Safer: {mem_mb: 5900}"),
        ([shard(seconds=200.0)], "asks 60 min, took at most 3.3 min in 1 job. Would do: {runtime: 10}"),
        ([shard(seconds=3300.0)], "asks 60 min, took at most 55 min in 1 job. Safer: {runtime: 110}"),
        (
            [shard(asked=replace(ASKED, cpus=8)), shard(cpu=3100.0, asked=replace(ASKED, cpus=8))],
            "asks 8 CPUs, kept at most 2.1 busy in 2 jobs. Would do: {cpus: 3}",
        ),
        (
            [shard(seconds=200.0, peak=0.1)],
            "asks 4000 MB, used at most 100 MB; asks 60 min, took at most 3.3 min in 1 job."
            " Would do: {mem_mb: 1000, runtime: 10}",
        ),
    ],
)
def test_a_request_far_from_what_was_used_is_named(jobs: Sequence[Job], line: str):
    assert usage_view.suggestion_lines(suggested(*jobs)) == [f"cache_shard {line}"]


def test_a_request_that_fits_is_not():
    assert suggested(shard()) == []
    # all CPUs busy, or not for long enough to tell
    assert suggested(shard(cpu=6000.0, asked=replace(ASKED, cpus=4))) == []
    assert suggested(shard(seconds=59.0, cpu=1.0, asked=Requested(4 * GB, 600, 8, 0))) == []


def test_nothing_is_suggested_of_what_was_not_seen():
    unseen = shard(peak=0.1, seen=False, asked=Requested(4 * GB, None, 8, 8))
    assert suggested(unseen, shard(peak=0.1, requested=None), shard(peak=0.1, peak_bytes=None)) == []


def test_rules_of_a_stage_are_kept_apart():
    gather = Job("cache", "cache", "run_cache", True, 20.0, 5.0, GB, Requested(2 * GB, 60 * 60, 1, 0), 0)
    assert [(rule.name, len(rule.jobs)) for rule in by_rule([gather, shard(), shard()])] == [
        ("run_cache", 1),
        ("cache_shard", 2),
    ]
