"""Stage train with two ranks against one process, by whatever they share, and from one to the other halfway."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import REPOSITORY
from tests.stages.small_run import CONTEXT, make_upstreams, options

from circuitmill.config.decode import decode
from circuitmill.config.parallel import ParallelConfig
from circuitmill.config.train import TrainConfig
from circuitmill.errors import ConfigError, InterruptedRun
from circuitmill.stages import train as stage
from circuitmill.stores.manifest import Manifest, load_manifest, plain
from circuitmill.stores.metrics import read_metrics
from circuitmill.stores.tensors import read_tensors

pytestmark = pytest.mark.slow
NET = 300
"""Seconds after which a test gives up."""
OF_PROCESSES = ("tokens_per_second", "data_wait_share", "peak_memory_bytes", "wire_bytes_per_step")


def tiny(**changes: Any) -> TrainConfig:
    """The smallest training; `nonlinearity={...}` changes a part of that part."""
    own = options("train", "tiny")
    for key, value in changes.items():
        own[key] = own[key] | value if isinstance(value, dict) else value
    return decode(TrainConfig, own, "train")


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    return make_upstreams(tmp_path_factory.mktemp("upstream"), tiny_model_dir, n_texts=1000)


@pytest.fixture(scope="module")
def alone(upstreams: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """By one process."""
    return stage.run(tiny(), **upstreams, out=tmp_path_factory.mktemp("alone") / "train")


def sharing(cfg: TrainConfig, strategy: str) -> TrainConfig:
    return dataclasses.replace(cfg, parallel=ParallelConfig(strategy))


def frozen(cfg: TrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(plain(cfg)))
    return str(path)


def command(cfg: TrainConfig, upstreams: dict[str, Path], out: Path) -> list[str]:
    """What circuitmill is called with."""
    config = frozen(cfg, out.with_suffix(".yaml"))
    inputs = [text for name, path in upstreams.items() for text in (f"--{name}", str(path))]
    return ["train", "--config", config, *inputs, "--out", str(out)]


def started(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )


def last_words(process: subprocess.Popen[str]) -> str:
    """What it wrote to stderr; its ranks do not outlive it."""
    try:
        return process.communicate(timeout=NET)[1]
    finally:
        process.kill()


def torchrun(*arguments: str) -> None:
    process = started("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments)
    errors = last_words(process)
    assert process.returncode == 0, errors[-5000:]


# comparing


def close(one: object, other: object, where: str, *, rel: float) -> None:
    """The same structure, and numbers to a relative difference; in a histogram a number may be in the bar beside."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            close(one[key], other[key], f"{where}.{key}", rel=rel)
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            close(left, right, f"{where}[{number}]", rel=rel)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=rel, abs=rel), where
    elif "histogram.counts" in where:
        assert abs(one - other) <= 1, where
    else:
        assert one == other, where


def distance(one: Path, other: Path) -> float:
    """Largest difference between the tensors of two models, relative to the largest number of each."""
    names = sorted(path.relative_to(one / "model") for path in (one / "model").rglob("*.safetensors"))
    assert names == sorted(path.relative_to(other / "model") for path in (other / "model").rglob("*.safetensors"))
    found = [0.0]
    for name in names:
        ours, theirs = read_tensors(one / "model" / name), read_tensors(other / "model" / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if value.is_floating_point():
                finite = value.isfinite()
                assert torch.equal(finite, theirs[key].isfinite()), key
                most = value[finite].abs().max().clamp_min(1e-30)
                found.append(((value - theirs[key])[finite].abs().max() / most).item())
    return max(found)


def rows(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in OF_PROCESSES}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def same(one: Path, other: Path, *, rel: float = 1e-3) -> None:
    """What two trainings wrote, but for the order of sums, which may make a feature fire on one token more or less."""
    assert distance(one, other) < rel / 10
    for ours, theirs in zip(rows(one), rows(other), strict=True):
        close(ours, theirs, f"step {ours['step']}", rel=rel)
    first, second = (load_manifest(folder / "manifest.json", "train") for folder in (one, other))
    second.verify()
    assert first.config == second.config and "parallel" not in first.config
    # a checkpoint has a file of every rank
    ours, theirs = ({name for name in each.files if not name.startswith("checkpoints/")} for each in (first, second))
    assert ours == theirs and "model/config.yaml" in ours
    close(first.counts, second.counts, "counts", rel=rel)


# one to the end


@pytest.mark.parametrize("strategy", ["features", "fsdp", "ddp"])
def test_two_ranks_under_torchrun_give_the_model_of_one(strategy, alone, upstreams, tmp_path):
    torchrun("circuitmill", *command(sharing(tiny(), strategy), upstreams, tmp_path / "two"))
    same(alone.folder, tmp_path / "two")
    assert alone.counts["steps"] == 32 and alone.counts["dead"] > 0
    last = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]
    assert last["wire_bytes_per_step"] > 0 and "heldout_ev" in last and "replacement_kl" in last


OF_A_BASE = {"base": "clt", "tokens": 16 * 8 * CONTEXT, "batch_tokens": 8 * CONTEXT}
KINDS = {
    "batch_topk": ("features", tiny(nonlinearity={"name": "batch_topk", "k": 4.0})),
    "token_topk": ("features", tiny(nonlinearity={"name": "token_topk", "k": 4.0})),
    "matryoshka": ("features", tiny(architecture={"prefixes": [5, 20, 32]})),
    "adapter": ("features", tiny(base="clt", adapter_rank=2)),
    "balanced_kl": ("features", tiny(**OF_A_BASE, loss={"kl": {"coefficient": 1.0, "balance": True}})),
    "balanced_kl_by_tokens": ("ddp", tiny(**OF_A_BASE, loss={"kl": {"coefficient": 1.0, "balance": True}})),
    "kl": ("ddp", tiny(**OF_A_BASE, loss={"kl": {"coefficient": 1e4}})),
}


def test_two_ranks_give_what_one_gives_of_other_kinds(alone, upstreams, tmp_path):
    """One start for all. Thresholds of top-k kinds are set at the end, over shards; kl reads whole sequences."""
    arguments = [f"{name}={path}" for name, path in upstreams.items()]
    for kind, (strategy, cfg) in KINDS.items():
        base = alone.folder / "manifest.json" if cfg.base else None
        stage.run(cfg, **upstreams, base=base, out=tmp_path / f"one-{kind}")
        config = frozen(sharing(cfg, strategy), tmp_path / f"{kind}.yaml")
        arguments += [config, str(tmp_path / f"two-{kind}"), str(base or "-")]
    torchrun("tests.stages.trained_together", *arguments)
    for kind in KINDS:
        same(tmp_path / f"one-{kind}", tmp_path / f"two-{kind}")


# from one to the other


def workers(launcher: int) -> list[int]:
    """Ranks that a launcher has started."""
    listed = [path.read_text() for path in Path(f"/proc/{launcher}/task").glob("*/children")]
    return [pid for pid in map(int, " ".join(listed).split()) if b"--out" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_a_training_goes_from_one_process_to_two_ranks_and_back(upstreams, tmp_path, monkeypatch):
    """Stopped each time; how the work is shared is not part of what the training is, so nothing starts again."""
    cfg, out = tiny(tokens=256 * 100, checkpoint_tokens=256), tmp_path / "train"
    calls = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(InterruptedRun, match="after step 10"):
        patch.setattr(stage.StopRequest, "__bool__", lambda self: next(calls) == 9)
        stage.run(sharing(cfg, "single"), **upstreams, out=out)
    process = started("circuitmill", "launch", "--per-node", "2", *command(sharing(cfg, "features"), upstreams, out))
    end = time.monotonic() + NET
    while steps(out)[-1] < 15:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    # one of them is enough
    (_, second) = workers(process.pid)
    os.kill(second, signal.SIGTERM)
    errors = last_words(process)
    assert process.returncode == InterruptedRun.exit_code, errors
    assert "continuing after step 10 of 100" in errors and "strategy features" in errors
    assert 15 <= steps(out)[-1] < 100 and not (out / "manifest.json").exists()
    assert f"a request to stop after step {steps(out)[-1]}" in errors
    stage.run(sharing(cfg, "ddp"), **upstreams, out=out)
    stage.run(cfg, **upstreams, out=tmp_path / "unbroken")
    same(tmp_path / "unbroken", out)


def test_a_strategy_that_cannot_be_had_is_refused_before_anything_is_touched(upstreams, tmp_path):
    cfg = tiny(n_features=42, architecture={"topology": "molt", "ranks": [3, 2, 1]})
    process = started(
        "circuitmill", "launch", "--per-node", "2", *command(sharing(cfg, "features"), upstreams, tmp_path / "train")
    )
    errors = last_words(process)
    assert process.returncode == ConfigError.exit_code, errors
    assert "a training that 2 ranks can share by strategy features; found transforms of several ranks" in errors
    assert "where: train.parallel.strategy" in errors
    assert not (tmp_path / "train").exists()
