"""Trainings that end at any moment and go on: with the same ranks to the same bits, with others to the same numbers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
KILLS = {"single": 20, "ddp": 10, "features": 10, "fsdp": 4, "mesh": 2}
"""By strategy: of one rank, two, two, two, four."""
EXACT = 1e-13
"""Relative; sums in another order, in float64."""
NET = 600
"""Seconds after which a test gives up."""


def outcomes(script: str, folder: Path) -> list[dict]:
    """What a script says of its trainings."""
    command = [sys.executable, "-m", f"tests.distributed.{script}", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=NET
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return outcomes("killed_ranks", tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return outcomes("moved_ranks", tmp_path_factory.mktemp("moved"))


def of(outcomes: list[dict], **wanted: object) -> Iterator[dict]:
    return (each for each in outcomes if all(each[key] == value for key, value in wanted.items()))


# killed


@pytest.mark.parametrize("strategy", KILLS)
def test_a_killed_training_goes_on_to_the_same_bits(strategy, killed):
    """Parameters, moments, counters, random states, and all rows of metrics."""
    found = list(of(killed, strategy=strategy))
    assert len(found) == KILLS[strategy]
    for each in found:
        assert each["unequal"] == [], each
        assert each["same_rows"], each


@pytest.mark.parametrize("strategy", KILLS)
def test_killed_ranks_were_killed_and_their_neighbours_did_not_stay(strategy, killed):
    for each in of(killed, strategy=strategy):
        codes = dict(enumerate(each["codes"]))
        assert all(codes.pop(rank) == -signal.SIGKILL for rank in each["victims"]), each
        # the others fail, because a collective or a checkpoint lacks a rank
        assert all(code == 1 for code in codes.values()) and len(each["errors"]) == len(codes), each


def test_kills_came_at_many_moments(killed):
    assert len({step for each in killed for step in each["killed_at"]}) >= 10
    assert any(each["writing"] for each in killed)
    assert {len(each["victims"]) for each in of(killed, strategy="features")} == {1, 2}


def test_killed_trainings_went_on_from_a_checkpoint_at_its_place_in_the_data(killed):
    assert sum(each["resumed_at"] > 0 for each in killed) > len(killed) / 2
    for each in killed:
        assert each["resumed_at"] <= min(each["killed_at"]), each
        for asked in each["asked"]:
            # the first batch is for starting values; the one after the last is read ahead
            rest = [*range(each["resumed_at"], each["steps"] + 1)]
            assert asked[-len(rest) :] == rest and set(asked) - set(rest) <= {0, 1}, each


# moved


@pytest.mark.parametrize("saved", KILLS)
def test_a_training_goes_on_with_other_ranks(saved, moved):
    found = [each for each in of(moved, mutation="") if each["saved"][0] == saved]
    for each in found:
        assert each["resumed_at"] == each["stopped_at"]
        # what was saved, bit by bit
        assert each["changed"] == [], each
        if each["case"] == "bf16":
            # each rank rounds its own features at random
            assert each["loss"] < 0.05 and each["held_out"] < 0.02, each
            continue
        # and from there what one process does that was never stopped
        assert each["unequal"] == [], each
        for key in ("loss", "held_out", "parameters", "optimizer", "running"):
            assert each[key] < EXACT, (key, each)
    assert len({(each["case"], *each["resumed"]) for each in found}) == len(found) > 1


def test_all_strategies_and_uneven_shards_were_read_by_others(moved):
    moves = {f"{each['saved'][0]}{each['saved'][1]}-{each['resumed'][0]}{each['resumed'][1]}" for each in moved}
    assert {f"features4-{other}" for other in ("single1", "features2", "features3", "fsdp2", "ddp2", "mesh4")} <= moves
    assert {"fsdp4-features3", "fsdp4-fsdp3", "mesh4-features3", "ddp2-features4", "single1-mesh4"} <= moves
    uneven = {each["case"] for each in of(moved, resumed=["features", 3])}
    assert {"jumprelu", "topk", "batch_topk_all", "matryoshka", "low_rank", "tied", "skip", "crosscoder"} <= uneven


@pytest.mark.parametrize("mutation", ["without_moments", "one_row_early", "without_counters"])
def test_a_checkpoint_that_is_read_wrongly_shows(mutation, moved):
    (found,) = of(moved, mutation=mutation)
    assert found["changed"] and found["unequal"]
    assert max(found["loss"], found["parameters"], found["optimizer"]) > 1e6 * EXACT
    if mutation == "without_moments":
        assert all(name.startswith("optimizer/") for name in found["changed"])
    if mutation == "one_row_early":
        assert {"parameter.W_enc", "optimizer/exp_avg/W_enc", "idle"} <= set(found["changed"])
    if mutation == "without_counters":
        assert found["changed"] == ["idle"]
