"""Two gloo processes against one that never initialised torch.distributed; values pass through files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import REPOSITORY

from circuitmill.stores.tensors import read_tensors


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, "-m", "tests.distributed.gradients", str(folder / name)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def read(path: Path) -> dict[str, torch.Tensor]:
        return read_tensors(path)

    return {name: [read(path) for path in sorted(folder.glob(f"{name}-*"))] for name in ("one", "two")}


def test_there_were_two_ranks_and_one_process(outcomes):
    assert [len(outcomes[name]) for name in ("one", "two")] == [1, 2]


def test_gradients_of_every_parameter_are_equal(outcomes):
    (one,), two = outcomes["one"], outcomes["two"]
    names = [name for name in one if name.startswith("gradient.")]
    assert {
        "gradient.W_enc",
        "gradient.b_enc",
        "gradient.decoder.W_dec.0",
        "gradient.b_dec",
        "gradient.log_threshold",
    } <= set(names)
    for name in (*names, "norm"):
        for rank in two:
            scale = one[name].abs().max()
            assert scale > 0
            assert (rank[name] - one[name]).abs().max() <= 1e-6 * scale, name


def test_gathered_rows_of_all_ranks_are_the_batch(outcomes):
    """From which every rank takes the same starting values that one rank alone takes."""
    (one,), two = outcomes["one"], outcomes["two"]
    for name in ("inputs", "outputs"):
        whole = one[f"own.{name}"]
        assert torch.equal(torch.cat([rank[f"own.{name}"] for rank in two]), whole)
        assert not torch.equal(*(rank[f"own.{name}"] for rank in two))
        for rank in (one, *two):
            assert torch.equal(rank[f"gathered.{name}"], whole)


def test_ranks_end_in_the_same_bits(outcomes):
    first, second = outcomes["two"]
    for name, value in first.items():
        if not name.startswith("own."):
            assert torch.equal(value, second[name]), name


def test_dead_counters_and_metrics_are_those_of_the_whole_batch(outcomes):
    (one,), (two, _) = outcomes["one"], outcomes["two"]
    assert torch.equal(one["idle"], two["idle"])
    for name in one:
        if name.startswith("row."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4, msg=name)
        if name.startswith("trained."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3, msg=name)


def test_l0_is_that_of_all_ranks_and_decides_on_all(outcomes):
    (one,), two = outcomes["one"], outcomes["two"]
    for rank in two:
        assert rank["rounded.reached"].tolist() == pytest.approx([3.9])
        assert 0 < rank["rounded.decay_from"] <= 32 * rank["rounded.steps"] < 640
        assert abs(rank["rounded.decay_from"] - one["rounded.decay_from"]) <= 32


def test_gradients_in_bfloat16_are_averaged_too(outcomes):
    (one,), (two, _) = outcomes["one"], outcomes["two"]
    assert two["rounded.parameter.W_enc"].dtype == torch.bfloat16
    for name in ("W_enc", "decoder.W_dec.0", "b_dec"):
        ours, theirs = two[f"rounded.parameter.{name}"].float(), one[f"rounded.parameter.{name}"].float()
        assert (ours - theirs).norm() <= 0.1 * theirs.norm(), name
