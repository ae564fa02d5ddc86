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
from circuitmill.stores.tensors import read_tensors
from circuitmill.training.monitor import read_metrics

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


def torchrun(*arguments: str) -> None:
    process = started("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments)
    _, errors = process.communicate(timeout=NET)
    assert process.returncode == 0, errors[-5000:]


# comparing


def close(one: object, other: object, where: str, *, rel: float) -> None:
    """The same structure, and numbers to a relative difference; counts in a histogram may differ by one."""
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
