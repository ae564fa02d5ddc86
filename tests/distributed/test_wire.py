"""What ranks send in a step: as the planner says to the byte, all of it counted, in as few pieces as there can be."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import REPOSITORY
from tests.distributed.wiring import BATCH, DATA, N_LAYERS, N_STEPS, TRAININGS, WIRINGS, possible

from circuitmill.config.train import TrainConfig
from circuitmill.training.objective import settings_at
from circuitmill.training.parallel.census import Division, Shape, count
from circuitmill.training.parallel.payload import Payload, payload

pytestmark = pytest.mark.slow
ALL = [
    (size, wiring, label)
    for size, wirings in WIRINGS.items()
    for wiring, own in wirings.items()
    for label, training in TRAININGS.items()
    if possible(training, own)
]
Step = dict[str, Any]
REDUCE, GATHER = "allreduce_", "broadcast_"
"""Every rank spreads its part to gather them all."""
CALLS: dict[tuple[str, str], dict[str, int]] = {
    # the sum of partial reconstructions; the batch and the figures
    ("features", "jumprelu"): {REDUCE: 1, GATHER: 2},
    ("features", "matryoshka"): {REDUCE: 1, GATHER: 2},
    ("features", "crosscoder"): {REDUCE: 1, GATHER: 2},
    ("features", "recomputed"): {REDUCE: 1, GATHER: 3},
    ("bf16", "jumprelu"): {REDUCE: 1, GATHER: 2},
    ("overlap", "jumprelu"): {REDUCE: N_LAYERS, GATHER: 2},
    # a ranking
    ("features", "topk"): {REDUCE: 1, GATHER: 3},
    ("features", "batch_topk_all"): {REDUCE: 1, GATHER: 3},
    ("features", "groupmax"): {REDUCE: 1, GATHER: 2},
    # shared halves of decoders; features that fire on a token
    ("features", "low_rank"): {REDUCE: 2, GATHER: 2},
    ("features", "penalties"): {REDUCE: 2, GATHER: 2},
    ("features", "micro_batches"): {REDUCE: 2, GATHER: 2},
    # gradients with counts, one piece by type; the figures
    ("ddp", "jumprelu"): {REDUCE: 1, GATHER: 1},
    ("ddp", "micro_batches"): {REDUCE: 1, GATHER: 1},
    ("ddp", "topk"): {REDUCE: 1, GATHER: 1},
    ("ddp", "batch_topk"): {REDUCE: 1, GATHER: 2},
    ("ddp", "bf16_weights"): {REDUCE: 2, GATHER: 1},
    ("fsdp", "jumprelu"): {REDUCE: 1, GATHER: 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1},
    ("mesh", "jumprelu"): {REDUCE: 2, GATHER: 2},
    ("mesh", "topk"): {REDUCE: 2, GATHER: 3},
    ("mesh", "batch_topk"): {REDUCE: 2, GATHER: 4},
}
"""Of a step without dead features and without a row of metrics."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[int, list[dict[str, list[Step]]]]:
    """By number of ranks: what each of them counted in each training."""
    return {size: counted(tmp_path_factory.mktemp(f"ranks-{size}"), size, tiny_model_dir) for size in WIRINGS}


def counted(folder: Path, size: int, model: Path) -> list[dict[str, list[Step]]]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launch, "-m", "tests.distributed.wiring", str(folder), str(model)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def planned(cfg: TrainConfig, label: str, size: int, step: int) -> Payload:
    """With as many features kept as in this step."""
    own = cfg.nonlinearity
    if own.k_start:
        k = settings_at(cfg, (step + 1) * BATCH).k
        cfg = replace(cfg, nonlinearity=replace(own, k=k, k_start=0.0, k_ramp_share=0.0))
    shape = Shape(N_LAYERS, TRAININGS[label].d_model)
    sharing = {"features": size, "mesh": cfg.parallel.feature_ranks}.get(cfg.parallel.strategy, 1)
    division = Division(cfg.parallel.strategy, size, sharing)
    return payload(cfg, shape, count(cfg, shape, fsdp_ranks=[size]), division, DATA[TRAININGS[label].data][2])


@pytest.mark.parametrize(("size", "wiring", "label"), ALL)
def test_every_step_sends_what_was_planned(groups, size, wiring, label):
    cfg = TRAININGS[label].under(WIRINGS[size][wiring])
    for rank in groups[size]:
        steps = rank[f"{wiring}/{label}"]
        assert len(steps) == N_STEPS and [step["row"] for step in steps] == [False, True, False, True]
        assert steps[0]["dead"] and not steps[2]["dead"]
        for number, step in enumerate(steps):
            plan = planned(cfg, label, size, number)
            expected = sum(plan.step.values())
            expected += sum(plan.dead.values()) if step["dead"] else 0
            expected += sum(plan.row.values()) if step["row"] else 0
            assert step["counted"] == expected, (number, plan, step)
            really = sum(size for _, size in step["calls"])
            assert really == expected + sum(plan.torch.values()), (number, plan, step)


def test_what_fully_shard_sends_is_all_that_is_not_counted(groups):
    for rank in groups[2]:
        for training, steps in rank.items():
            names = {name for step in steps for name, _ in step["calls"]}
            assert names - {REDUCE, GATHER} == (
                {"_allgather_base_", "_reduce_scatter_base_"} if training.startswith("fsdp/") else set()
            )


@pytest.mark.parametrize(("wiring", "label"), CALLS)
def test_nothing_is_sent_in_more_pieces_than_it_needs(groups, wiring, label):
    (size,) = [size for size, wirings in WIRINGS.items() if wiring in wirings]
    for rank in groups[size]:
        step = rank[f"{wiring}/{label}"][2]
        assert not step["dead"] and not step["row"]
        assert Counter(name for name, _ in step["calls"]) == CALLS[wiring, label]


def test_dead_features_and_rows_of_metrics_cost_a_few_more(groups):
    for size, wiring in ((2, "features"), (4, "mesh"), (2, "ddp")):
        plain, dead, row = (
            Counter(name for name, _ in groups[size][0][f"{wiring}/jumprelu"][number]["calls"]) for number in (2, 0, 3)
        )
        sharing, apart = wiring != "ddp", wiring != "features"
        # a ranking of each source's dead features, and the sum of what they explain
        assert dead - plain == (Counter({GATHER: N_LAYERS, REDUCE: 1}) if sharing else Counter())
        assert row - plain == (Counter({GATHER: 1}) if apart else Counter())
