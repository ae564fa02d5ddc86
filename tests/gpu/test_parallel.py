"""Ranks that share one GPU, through gloo, against one process on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import REPOSITORY
from tests.distributed.cases import CASES, tried

from circuitmill.stores.tensors import read_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def start(folder: Path, size: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, *launch, "-m", "tests.distributed.ranks", str(folder), "gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [read_tensors(folder / f"{rank}.safetensors") for rank in range(size)]


def test_two_ranks_on_one_gpu_have_the_gradients_of_one_process(tmp_path):
    (one,), two = start(tmp_path / "1", 1), start(tmp_path / "2", 2)
    for strategy in ("ddp", "fsdp", "features", "overlap"):
        for case in (case for case in CASES if tried(strategy, 2, case)):
            names = [name for name in one if name.startswith(f"single/{case}/gradient.")]
            assert names
            for name in names:
                for found in two:
                    ours, theirs = found[name.replace("single/", f"{strategy}/", 1)], one[name]
                    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max(), (strategy, name)
