"""Snakemake's benchmark files: real ones, and those of short, repeated and distributed jobs."""

import json
from pathlib import Path

import pytest

from circuitmill.errors import StoreError
from circuitmill.stores.benchmarks import Requested, read_benchmarks, stage_of

PLAIN = (
    '{"cpu_time": 9.78, "h:m:s": "0:00:10", "io_in": 1.5, "io_out": 0.5, "max_pss": 487.5, "max_rss": 512.5, '
    '"max_uss": 461.0, "max_vms": 2728.1, "mean_load": 87.9, "s": 10.5598}'
)
"""As snakemake 9.27 writes it."""
EXTENDED = json.loads(PLAIN) | {
    "cpu_usage": 764.4,
    "input_size_mb": {"results/tiny/toyworld/manifest.json": 0.0044},
    "jobid": 28,
    "params": {"out": "results/tiny/main/attribute/prompt/capital", "revision": 2},
    "resources": {"_cores": 1, "_nodes": 1, "mem": "4 GB", "mem_mb": 4000, "mem_mib": 3815, "runtime": 60},
    "rule_name": "attribute_prompt",
    "threads": 2,
    "wildcards": {"prompt": "capital", "variant": "main"},
}
"""With --benchmark-extended."""
SHORT = dict.fromkeys(("cpu_time", "io_in", "io_out", "max_pss", "max_rss", "max_uss", "max_vms"), "NA") | {"s": 0.2}
MIB = 2**20


def write(folder: Path, place: str, *rows: dict | str) -> None:
    path = folder / f"{place}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_a_plain_file_does_not_say_what_was_asked_for(tmp_path: Path):
    write(tmp_path, "cache/shard/train-00000", PLAIN)
    (found,) = read_benchmarks(tmp_path)
    assert (found.place, found.stage, found.rule) == ("cache/shard/train-00000", "cache", "cache_shard")
    assert (found.seconds, found.cpu_seconds, found.peak_bytes) == (10.5598, 9.78, round(512.5 * MIB))
    assert (found.read_bytes, found.written_bytes, found.requested) == (1.5 * MIB, MIB / 2, None)


def test_an_extended_one_does(tmp_path: Path):
    write(tmp_path, "main/attribute/prompt/capital", EXTENDED)
    (found,) = read_benchmarks(tmp_path)
    assert (found.stage, found.rule) == ("attribute", "attribute_prompt")
    assert found.requested == Requested(memory_bytes=4_000_000_000, seconds=3600, cpus=2, gpus=0)


def test_stages_come_in_the_order_of_their_places_and_other_rules_not_at_all(tmp_path: Path):
    for place in ("main/train", "cache", "cache/shard/train-0000", "main/config/train", "config/cache"):
        write(tmp_path, place, PLAIN)
    found = [(one.place, one.rule) for one in read_benchmarks(tmp_path)]
    assert sorted(found) == [
        ("cache", "run_cache"),
        ("cache/shard/train-0000", "cache_shard"),
        ("main/train", "run_train"),
    ]


def test_variants_may_have_names_of_stages():
    assert [stage_of(place) for place in ("train/train", "cache/evaluate", "features/features/block/0000")] == [
        "train",
        "evaluate",
        "features",
    ]
    assert stage_of("main/else") is None and stage_of("else") is None


@pytest.mark.parametrize(
    "row", [SHORT, SHORT | {"max_rss": 0, "cpu_time": 0.0, "io_in": 0.0}, SHORT | {"max_rss": None}, {"s": 0.2}]
)
def test_a_job_too_short_to_be_looked_at_has_a_time_alone(tmp_path: Path, row: dict):
    write(tmp_path, "main/train", row)
    (found,) = read_benchmarks(tmp_path)
    assert found.seconds == 0.2
    assert (found.cpu_seconds, found.peak_bytes, found.read_bytes) == (None, None, None)


def test_attempts_add_up_but_for_memory(tmp_path: Path):
    more = EXTENDED | {"s": 4.0, "max_rss": 100.0, "cpu_time": 1.0}
    write(tmp_path, "main/attribute/prompt/capital", EXTENDED, SHORT, more)
    (found,) = read_benchmarks(tmp_path)
    assert found.seconds == pytest.approx(14.7598) and found.cpu_seconds == pytest.approx(10.78)
    assert found.peak_bytes == round(512.5 * MIB) and found.requested is not None


@pytest.mark.parametrize(
    ("resources", "gpus", "cpus", "seen"),
    [
        ({"gpu": 2, "cpus_per_task": 8}, 2, 8, True),
        ({"gres": "gpu:4", "nodes": 1}, 4, 2, True),
        ({"gres": "gpu:a100:4", "nodes": 2, "mpi": "srun", "cpus_per_task": 16}, 8, 16, False),
    ],
)
def test_gpus_and_cpus_are_those_that_the_job_had(tmp_path: Path, resources: dict, gpus: int, cpus: int, seen: bool):
    write(tmp_path, "main/train", EXTENDED | {"resources": resources, "rule_name": "run_train"})
    (found,) = read_benchmarks(tmp_path)
    assert found.requested == Requested(memory_bytes=None, seconds=None, cpus=cpus, gpus=gpus)
    # a step of several nodes runs elsewhere: what srun itself uses says nothing
    assert found.seen is seen and (found.peak_bytes is None) is not seen and (found.cpu_seconds is None) is not seen


def test_an_empty_file_is_no_job(tmp_path: Path):
    write(tmp_path, "main/train")
    assert read_benchmarks(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"max_rss": 3}', '{"s": "NA"}', '{"s": NaN}', PLAIN[:40]])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    write(tmp_path, "main/train", PLAIN, text)
    with pytest.raises(StoreError, match=r"figures of a job per line[\s\S]*main/train\.jsonl:2[\s\S]*fix: +delete"):
        read_benchmarks(tmp_path)


def test_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="no such folder"):
        read_benchmarks(tmp_path / "benchmarks")
