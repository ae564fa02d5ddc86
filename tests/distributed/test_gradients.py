"""Groups of gloo processes against one that never initialised torch.distributed; values pass through files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import REPOSITORY
from tests.distributed.cases import CASES, STRATEGIES, tried
from tests.distributed.ranks import CURVES

from circuitmill.stores.tensors import read_tensors

pytestmark = pytest.mark.slow
SIZES = (2, 3, 4)
Found = dict[str, torch.Tensor]


def start(folder: Path, size: int, *options: str) -> list[Found]:
    """What each of so many ranks finds."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, *launch, "-m", "tests.distributed.ranks", str(folder), *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [read_tensors(folder / f"{rank}.safetensors") for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> Found:
    return start(folder / "1", 1)[0]


@pytest.fixture(scope="module")
def groups(folder: Path) -> dict[int, list[Found]]:
    return {size: start(folder / str(size), size) for size in SIZES}


def of(found: Found, strategy: str, case: str) -> Found:
    prefix = f"{strategy}/{case}/"
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_every_parameter_are_those_of_one_process(one, groups, strategy, case):
    expected = of(one, "single", case)
    names = [name for name in expected if name.startswith(("gradient.", "clipped."))]
    assert {f"gradient.{name}" for name in ("W_enc", "b_enc", "b_dec")} <= set(names)
    assert sum(name.startswith("gradient.decoder.") for name in names) >= 1
    assert ("gradient.log_threshold" in names) == (CASES[case].nonlinearity.name == "jumprelu")
    seen = 0
    for size, ranks in groups.items():
        for found in ranks if tried(strategy, size, case) else []:
            ours = of(found, strategy, case)
            for name in names:
                assert expected[name].abs().max() > 0, name
                assert difference(ours[name], expected[name]) <= 1e-9, (size, name)
            seen += 1
    assert seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clip_factor_and_figures_are_the_same_on_all_ranks(one, groups, strategy, case):
    expected = of(one, "single", case)
    names = [name for name in expected if name.startswith("term.")] + ["norm", "loss", "l0"]
    for size, ranks in groups.items():
        if not tried(strategy, size, case):
            continue
        first, *others = [of(found, strategy, case) for found in ranks]
        for name in (*names, "least", "asked"):
            assert all(torch.equal(first[name], other[name]) for other in others), (size, name)
        for name in names:
            torch.testing.assert_close(first[name], expected[name], rtol=1e-9, atol=0, msg=name)
        assert first["asked"] == 1.0, "rank 1 was asked to stop, and all know it"
    assert expected["asked"] == 0.0
    assert any(of(one, "single", each)["norm"] > CASES[each].optimizer.clip_norm for each in CASES), (
        "nothing was clipped"
    )


def test_a_backward_that_sums_again_is_noticed(one, folder):
    """Gradients of encoders, decoders and thresholds are then W times too large and those of decoder biases are not."""
    for found in start(folder / "wrong", 2, "wrong"):
        for case in CASES:
            if not tried("features", 2, case):
                continue
            ours, expected = of(found, "features", case), of(one, "single", case)
            assert difference(ours["gradient.b_dec"], expected["gradient.b_dec"]) <= 1e-9
            wrong = [name for name in expected if name.startswith("gradient.") and "_skip" not in name]
            for name in set(wrong) - {"gradient.b_dec"}:
                assert difference(ours[name], expected[name]) > 1e-3, (case, name)


@pytest.mark.parametrize(
    ("size", "strategy", "case"),
    [
        (size, strategy, case)
        for size in (2, 4)
        for strategy in ("ddp", "fsdp", "features", "mesh")
        for case in CURVES[size]
        if tried(strategy, size, case)
    ],
)
def test_two_hundred_steps_go_the_same_way(one, groups, size, strategy, case):
    expected = of(one, "single", case)
    assert len(expected["curve.loss"]) == 200
    for found in groups[size]:
        curves = {name: value for name, value in of(found, strategy, case).items() if name.startswith("curve.")}
        assert "curve.loss" in curves
        for name, value in curves.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=f"{size} {name}")


@pytest.mark.parametrize("case", ["topk", "batch_topk_all"])
def test_k_features_fire_whatever_the_number_of_ranks(one, groups, case):
    """Exactly k per token and layer over a batch: there are more positive pre-activations than that."""
    expected = CASES[case].nonlinearity.k * 2
    for size, ranks in ((1, [one]), *groups.items()):
        for strategy in ("single", "ddp", "fsdp", "features", "mesh"):
            for ours in [of(found, strategy, case) for found in ranks if of(found, strategy, case)]:
                assert ours["l0"].sum().item() == pytest.approx(expected, rel=1e-12), (size, strategy)
                curves = [value for name, value in ours.items() if name == "curve.l0"]
                assert all((curve <= expected + 1e-9).all() for curve in curves)
                assert all(curve[:20].mean().item() == pytest.approx(expected, rel=1e-9) for curve in curves)


def test_trained_weights_are_put_together_on_the_first_rank_alone(one, groups):
    for size in (2, 4):
        for number, found in enumerate(groups[size]):
            names = [name for name in of(found, "features", "jumprelu") if name.startswith("curve.trained.")]
            assert bool(names) == (number == 0)
