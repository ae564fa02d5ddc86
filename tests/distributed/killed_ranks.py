"""Trainings that are killed at random moments and go on, against unbroken ones.

python -m tests.distributed.killed_ranks FOLDER       (leaves FOLDER/outcomes.json)
"""

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tests.distributed.cases import arranged
from tests.distributed.resuming_ranks import (
    Orders,
    finish,
    last_state,
    rows,
    start,
    train,
    unequal,
    variant,
    wait_for,
)

from circuitmill.config.train import TrainConfig
from circuitmill.distributed import Ranks

STEPS = 40
LONGEST = 0.02
"""Seconds from the step, or from the beginning of a write, to the kill: some steps, or some files."""
TRAININGS: dict[str, TrainConfig] = {
    "adam": variant("jumprelu", STEPS),
    "bf16": variant("batch_topk_all", STEPS, name="adamw", weight_decay=0.1, precision="bf16"),
    "schedule_free": variant("jumprelu", STEPS, name="schedule_free"),
    "adamw": variant("matryoshka", STEPS, name="adamw", weight_decay=0.1),
}
GROUPS = {
    "single": (1, ("adam", "bf16"), 10),
    "ddp": (2, ("adam", "schedule_free"), 5),
    "features": (2, ("adam", "bf16"), 5),
    "fsdp": (2, ("adam", "adamw"), 2),
    "mesh": (4, ("adam",), 2),
}
"""Ranks, trainings, and kills of each training."""


@dataclass(frozen=True)
class Outcome:
    """Of one training that was killed and went on."""

    strategy: str
    training: str
    victims: list[int]
    killed_at: list[int]
    """Step that each rank was at in the end."""
    codes: list[int | None]
    """Of the ranks that were killed, or whose neighbours were."""
    errors: list[str]
    """Of the neighbours."""
    writing: bool
    """Whether half a checkpoint was left."""
    resumed_at: int
    steps: int
    """Of the whole training."""
    asked: list[list[int]]
    """Batches that each rank asked for afterwards."""
    unequal: list[str]
    """Tensors of the last checkpoint that differ from the unbroken training's in a bit."""
    same_rows: bool


def work(strategy: str, cfg: TrainConfig, folder: Path, orders: Orders) -> Callable[[Ranks], None]:
    return lambda ranks: train(cfg, arranged(strategy, cfg, ranks), folder, orders)


def kill(strategy: str, cfg: TrainConfig, folder: Path, rng: random.Random, victims: list[int]) -> list[int | None]:
    """Start a training and kill some of its ranks at a random moment; every other time in a write."""
    size = GROUPS[strategy][0]
    doing = multiprocessing.get_context("fork").RawArray("q", [-1] * size)
    at, mid_write, after = rng.randrange(1, STEPS - 1), rng.random() < 0.5, rng.uniform(0, LONGEST)
    # neighbours of a victim are to fail, not to wait
    hold = STEPS - 1
    ranks = start(size, folder, work(strategy, cfg, folder, Orders(doing=doing, hold_at=hold, held=tuple(victims))))
    wait_for(lambda: all(doing[rank] >= at for rank in victims), ranks)
    if mid_write:
        partial = (folder / "checkpoints").glob
        wait_for(lambda: any(partial(".*.partial")) or any(doing[rank] == hold for rank in victims), ranks)
        after /= 10
    time.sleep(after)
    for rank in victims:
        ranks[rank].kill()
    return finish(ranks)


def steps_of(folder: Path, number: int, rank: int) -> list[int]:
    return [int(line) for line in (folder / f"steps-{number}-{rank}").read_text().split()]


def outcome(strategy: str, training: str, folder: Path, rng: random.Random, victims: list[int]) -> Outcome:
    """Kill, and go on to the end; the comparison comes when all ranks have been forked."""
    cfg, size = TRAININGS[training], GROUPS[strategy][0]
    codes = kill(strategy, cfg, folder, rng, victims)
    writing = any((folder / "checkpoints").glob(".*.partial"))
    again = finish(start(size, folder, work(strategy, cfg, folder, Orders(number=1))))
    assert again == [0] * size, (folder, again)
    return Outcome(
        strategy,
        training,
        victims,
        killed_at=[steps_of(folder, 0, rank)[-1] for rank in range(size)],
        codes=codes,
        errors=[path.read_text() for path in sorted(folder.glob("meeting-0-error-*"))],
        writing=writing,
        resumed_at=steps_of(folder, 1, 0)[0],
        steps=STEPS,
        asked=[[int(line) for line in path.read_text().split()] for path in sorted(folder.glob("asked-1-*"))],
        unequal=[],
        same_rows=False,
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    found: list[tuple[Path, Path, Outcome]] = []
    for strategy, (size, trainings, kills) in GROUPS.items():
        for training in trainings:
            unbroken = folder / f"{strategy}-{training}"
            whole = work(strategy, TRAININGS[training], unbroken, Orders())
            assert finish(start(size, unbroken, whole)) == [0] * size
            for trial in range(kills):
                # every other time one rank alone
                victims = [rng.randrange(size)] if size > 1 and trial % 2 else list(range(size))
                broken = folder / f"{unbroken.name}-{trial}"
                found.append((unbroken, broken, outcome(strategy, training, broken, rng, victims)))
    outcomes = [
        asdict(each)
        | {"unequal": unequal(*(last_state(training / "checkpoints") for training in (one, other)))}
        | {"same_rows": rows(one) == rows(other)}
        for one, other, each in found
    ]
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
