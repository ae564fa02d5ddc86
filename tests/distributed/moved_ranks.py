"""Trainings that stop halfway and go on with other ranks that divide the work in another way, against one process.

python -m tests.distributed.moved_ranks FOLDER       (leaves FOLDER/outcomes.json)
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests.distributed.cases import arranged
from tests.distributed.resuming_ranks import Orders, Tensors, finish, last_state, rows, start, train, unequal, variant

from circuitmill.config.train import TrainConfig
from circuitmill.distributed import Ranks
from circuitmill.stores.checkpoints import Entry, Part
from circuitmill.training.parallel.placement import Placement

STEPS, HALF = 24, 12
MAIN = ("jumprelu", "topk", "batch_topk_all", "matryoshka")
FORMS = ("matryoshka_topk", "low_rank", "tied", "skip", "crosscoder")
OPTIMIZERS = ("schedule_free", "bf16")
"""Strategy fsdp does not have these."""
DECAYED = {"name": "adamw", "weight_decay": 0.1}
CASES: dict[str, TrainConfig] = {
    **{case: variant(case, STEPS) for case in (*MAIN, *FORMS) if not case.startswith("matryoshka")},
    **{case: variant(case, STEPS, **DECAYED) for case in ("matryoshka", "matryoshka_topk")},
    "schedule_free": variant("jumprelu", STEPS, name="schedule_free", weight_decay=0.1),
    "bf16": variant("jumprelu", STEPS, **DECAYED, precision="bf16"),
}
Place = tuple[str, int]
"""Strategy and ranks."""
ONE: Place = ("single", 1)
MOVES: dict[tuple[Place, Place], tuple[str, ...]] = {
    (("features", 4), ONE): (*MAIN, *OPTIMIZERS),
    (("features", 4), ("features", 2)): MAIN,
    (("features", 4), ("features", 3)): (*MAIN, *FORMS),
    (("features", 4), ("fsdp", 2)): MAIN,
    (("features", 4), ("ddp", 2)): (*MAIN, *OPTIMIZERS),
    (("features", 4), ("mesh", 4)): ("jumprelu", "matryoshka"),
    (("fsdp", 4), ("features", 3)): (*MAIN, *FORMS),
    (("fsdp", 4), ("fsdp", 3)): ("jumprelu", "low_rank"),
    (("mesh", 4), ("features", 3)): ("jumprelu", "batch_topk_all"),
    (("ddp", 2), ("features", 4)): ("batch_topk_all", *OPTIMIZERS),
    (ONE, ("mesh", 4)): MAIN,
    (ONE, ("fsdp", 3)): ("jumprelu", "tied"),
}
MUTATED: tuple[Place, Place] = (("features", 4), ("features", 2))


@dataclass(frozen=True)
class Outcome:
    """Of one case that was moved: largest differences, relative to the largest number of the unbroken training."""

    case: str
    saved: Place
    resumed: Place
    mutation: str
    loss: float
    """Of all steps, those before the move included."""
    held_out: float
    parameters: float
    optimizer: float
    running: float
    """Means of density, L0 and the smallest activation."""
    unequal: list[str]
    """What must be the same exactly: steps, idle counters and densities, dead features and L0 of every row."""
    changed: list[str]
    """Tensors of which the ranks that go on have read other bits than were saved, by their own account."""
    stopped_at: int
    resumed_at: int


def name(place: Place) -> str:
    return f"{place[0]}-{place[1]}"


# mutations of what a rank reads


def without_moments() -> None:
    whole = Placement.tensors
    Placement.tensors = lambda self, entries: {
        key: value for key, value in whole(self, entries).items() if not key.startswith("optimizer/")
    }


def one_row_early() -> None:
    right = Placement.wanted

    def wrong(self: Placement, saved: dict) -> dict[str, Entry]:
        return {
            key: replace(entry, start=max(0, entry.start - 1)) if isinstance(entry, Part) else entry
            for key, entry in right(self, saved).items()
        }

    Placement.wanted = wrong


def without_counters() -> None:
    whole = Placement.tensors
    Placement.tensors = lambda self, entries: {
        key: torch.zeros_like(value) if key == "idle" else value for key, value in whole(self, entries).items()
    }


MUTATIONS: dict[str, Callable[[], None]] = {
    "without_moments": without_moments,
    "one_row_early": one_row_early,
    "without_counters": without_counters,
}

# trainings


def run(size: int, folder: Path, jobs: list[tuple[str, str, Path, Orders]], before: Callable[[], None] | None) -> None:
    """Some trainings, one after the other, by the same ranks."""

    def work(ranks: Ranks) -> None:
        if before is not None:
            before()
        layouts = {}
        for strategy, case, out, orders in jobs:
            if strategy not in layouts:
                # torch.distributed does not take groups back, and all cases have the same number of features
                layouts[strategy] = arranged(strategy, CASES[case], ranks)
            train(CASES[case], layouts[strategy], out, orders)

    assert finish(start(size, folder, work)) == [0] * size


def save(folder: Path) -> None:
    """Unbroken trainings of one process, and halves by all that are moved."""
    wanted = {(place, case): None for (place, _), cases in MOVES.items() for case in cases}
    for size in sorted({n_ranks for (_, n_ranks), _ in wanted}):
        jobs = [
            (place[0], case, folder / "saved" / name(place) / case, orders_of(case, stop_after=HALF))
            for place, case in wanted
            if place[1] == size
        ]
        if size == 1:
            jobs += [("single", case, folder / "unbroken" / case, orders_of(case)) for case in CASES]
        run(size, folder, jobs, None)


def resume(folder: Path) -> list[tuple[str, Place, Place, str, Path]]:
    """All second halves."""
    moves = [(case, *move, "") for move, cases in MOVES.items() for case in cases]
    found = []
    for case, saved, resumed, mutation in [*moves, *(("jumprelu", *MUTATED, mutation) for mutation in MUTATIONS)]:
        out = folder / "moved" / f"{name(saved)}-{name(resumed)}{mutation}" / case
        shutil.copytree(folder / "saved" / name(saved) / case, out)
        found.append((case, saved, resumed, mutation, out))
    for size in sorted({resumed[1] for _, _, resumed, _, _ in found}):
        for mutation in ["", *MUTATIONS]:
            jobs = [
                (resumed[0], case, out, orders_of(case, number=1, copy=out / "copy"))
                for case, _, resumed, its, out in found
                if resumed[1] == size and its == mutation
            ]
            if jobs:
                run(size, folder, jobs, MUTATIONS.get(mutation))
    return found


def orders_of(case: str, **orders: Any) -> Orders:
    return Orders(exact=case != "bf16", **orders)


# comparing


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double(), other.double()
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-300)).item() if one.numel() else 0.0


def state_of(checkpoints: Path) -> Tensors:
    """Without what belongs to a rank alone."""
    return {key: value for key, value in last_state(checkpoints).items() if not key.startswith("random_state")}


def compared(unbroken: Path, saved: Path, moved: Path) -> dict:
    ours, theirs = (state_of(folder / "checkpoints") for folder in (unbroken, moved))
    assert ours.keys() == theirs.keys()

    def most(chosen: Callable[[str], bool], one: Tensors = ours) -> float:
        return max(difference(one[key], theirs[key]) for key in one if chosen(key))

    expected, found = rows(unbroken), rows(moved)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    exactly = [
        key for key in ("idle", "density", "step", "reached", "decay_from") if not torch.equal(ours[key], theirs[key])
    ]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        exactly += [
            f"{key} at {one['step']}" for key in ("dead", "l0", "lr", "dead_features") if one.get(key) != other.get(key)
        ]

    def column(rows: list[dict], *keys: str) -> torch.Tensor:
        return torch.tensor([[row[key] for key in keys] for row in rows if keys[0] in row], dtype=torch.float64)

    return {
        "loss": max(difference(column(expected, key), column(found, key)) for key in ("loss", "ev", "grad_norm")),
        "held_out": difference(column(expected, "heldout_ev"), column(found, "heldout_ev")),
        "parameters": most(lambda key: key.startswith("parameter.")),
        "optimizer": most(lambda key: key.startswith("optimizer")),
        "running": most(lambda key: key in ("density", "l0", "least")),
        "unequal": exactly,
        "changed": unequal(state_of(saved / "checkpoints"), state_of(moved / "copy")),
        "resumed_at": int((moved / "steps-1-0").read_text().split()[0]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    save(folder)
    outcomes = [
        Outcome(
            *(case, saved, resumed, mutation),
            stopped_at=HALF,
            **compared(folder / "unbroken" / case, folder / "saved" / name(saved) / case, out),
        )
        for case, saved, resumed, mutation, out in resume(folder)
    ]
    (folder / "outcomes.json").write_text(json.dumps([asdict(each) for each in outcomes]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
