"""Forked gloo processes that save and read checkpoints, with faults, and leave files for the tests to compare.

python -m tests.stores.checkpoint_ranks SCENARIO FOLDER

One interpreter imports torch and forks the ranks before it starts any thread.
"""

import datetime
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

from circuitmill.errors import StoreError
from circuitmill.stores import sharded
from circuitmill.stores.checkpoints import Checkpoints, Entry, Part
from circuitmill.stores.tensors import write_tensors

FEATURES = 10
LIMIT = datetime.timedelta(seconds=120)
READERS = (1, 2, 3)

Work = Callable[[int, int, dist.ProcessGroup, Path], None]


def whole() -> dict[str, torch.Tensor]:
    """Every type, values without meaning: the bits must come back, not-a-numbers too."""
    generator = torch.Generator().manual_seed(0)

    def bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)

    return {
        "parameter.W_enc": bits(FEATURES, 3, dtype=torch.float32),
        "parameter.W_dec": bits(2, FEATURES, 3, dtype=torch.float32),
        "optimizer/exp_avg/W_enc": bits(FEATURES, 3, dtype=torch.bfloat16),
        "half": bits(FEATURES, dtype=torch.float16),
        "double": bits(FEATURES, dtype=torch.float64),
        "small": bits(FEATURES, dtype=torch.int32),
        "idle": bits(2, FEATURES, dtype=torch.int64),
        "codes": bits(FEATURES, dtype=torch.uint8),
        "flags": torch.arange(FEATURES) % 3 == 0,
        "few": bits(5, 2, dtype=torch.float32),
        "nothing": torch.zeros(0, 3),
        "no rows": torch.zeros(0, 2, dtype=torch.int32),
        "random_state": bits(50, dtype=torch.uint8),
        "density": torch.tensor(0.25, dtype=torch.float64),
        "step": torch.tensor(7),
        "own": bits(6, dtype=torch.float32),
    }


AXES = {
    **dict.fromkeys(("parameter.W_enc", "optimizer/exp_avg/W_enc", "half", "double", "small", "codes", "flags"), 0),
    **{"parameter.W_dec": 1, "idle": 1, "few": 0, "no rows": 0},
}


def spread(tensors: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, Entry]:
    """What a rank has: a stretch of ceil(n / size) rows, or all; `own` is on one rank only."""
    state: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        axis = AXES.get(name)
        if axis is None:
            if name != "own" or rank == min(1, size - 1):
                state[name] = tensor.clone()
            continue
        total = tensor.shape[axis]
        rows = -(-total // size)
        start = min(rank * rows, total)
        # the values keep the strides of the whole, as a shard of a larger parameter does
        state[name] = Part(tensor.clone().narrow(axis, start, min(rows, total - start)), axis, start, total)
    return state


def empty(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Places to read into, of other bits than what is read."""
    return {
        name: (~tensor.view(torch.uint8)).view(tensor.dtype) if tensor.dim() else tensor + 1
        for name, tensor in tensors.items()
    }


# scenarios


def save_and_read(rank: int, size: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Four ranks save, as one axis and as a mesh, and one alone; groups of one, two and three read all."""
    sharded.FILE_BYTES = 100
    groups = {count: dist.new_group(list(range(count)), timeout=LIMIT) for count in READERS}
    with Checkpoints(folder / "four", keep=2, rank=rank, size=size, group=group) as checkpoints:
        for _ in range(2):  # the second waits for the first and replaces it
            state = spread(whole(), rank, size)
            checkpoints.save(7, state)
            for entry in state.values():
                sharded.values_of(entry).zero_()
    with Checkpoints(folder / "mesh", keep=1, rank=rank, size=size, group=group) as checkpoints:
        checkpoints.save(7, spread(whole(), rank % 2, 2))
    if rank == 0:
        with Checkpoints(folder / "one", keep=1) as checkpoints:
            checkpoints.save(7, spread(whole(), 0, 1))
    dist.barrier(group)
    for count in READERS:
        if rank < count:
            for saved in ("four", "mesh", "one"):
                about = {} if count == 1 else {"rank": rank, "size": count, "group": groups[count]}
                with Checkpoints(folder / saved, keep=1, **about) as checkpoints:
                    last = checkpoints.last()
                entries = spread(empty(whole()), rank, count)
                last.read(entries)
                tensors = {name: sharded.values_of(entry) for name, entry in entries.items()}
                write_tensors(folder / f"{saved}-read-by-{count}-{rank}.safetensors", tensors)
    dist.barrier(group)


def fail(rank: int, size: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Rank 1 cannot write, cannot copy, or has something else than rank 0."""
    heard: dict[str, str] = {}

    def attempt(name: str, step: int, state: dict[str, Entry]) -> None:
        try:
            checkpoints.save(step, state)
            checkpoints.wait()
            heard[name] = "saved"
        except StoreError as error:
            heard[name] = str(error)
        dist.barrier(group)
        heard[f"{name} left"] = " ".join(sorted(os.listdir(folder / "checkpoints")))
        dist.barrier(group)

    def part(start: int, rows: int, total: int = 40_000) -> dict[str, Entry]:
        return {"W": Part(torch.full((rows,), 1.0), 0, start, total)}

    checkpoints = Checkpoints(folder / "checkpoints", keep=1, rank=rank, size=size, group=group)
    good = part(rank * 20_000, 20_000)
    attempt("first", 1, good)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    attempt("write", 2, good)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    stage = sharded.stage
    if rank == 1:
        sharded.stage = no_memory
    attempt("copy", 3, good)
    sharded.stage = stage
    attempt("shape", 4, part(rank * 20_000, 20_000, 40_000 + rank))
    attempt("type", 4, good if rank == 0 else {"W": torch.ones(40_000, dtype=torch.float64)})
    attempt("gap", 4, part(rank * 20_001, 19_999))
    attempt("overlap", 4, part(rank * 19_999, 20_001))
    attempt("outside", 4, part(rank * 20_001, 20_000))
    attempt("step", 5 + rank, good)
    attempt("next", 9, good)
    for number, path in enumerate(sorted((folder / "checkpoints" / "step-00000009").glob("*.safetensors"))):
        content = path.read_bytes()
        if rank == 0:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier(group)
        try:
            checkpoints.last()
        except StoreError as error:
            heard[f"damaged {number}"] = str(error)
        dist.barrier(group)
        if rank == 0:
            path.write_bytes(content)
        dist.barrier(group)
    heard["restored"] = str(checkpoints.last().step)
    checkpoints.close()
    (folder / f"heard-{rank}.json").write_text(json.dumps(heard))


def no_memory(*_: object) -> None:
    raise MemoryError("no memory for a copy")


def die(rank: int, size: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Block in the middle of the second save, on the ranks that are to be killed, until the kill."""
    killed = [int(name) for name in (folder / "killed").read_text().split()]
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, rank=rank, size=size, group=group)
    state = {"W": Part(torch.full((3,), float(rank)), 0, 3 * rank, 6)}
    checkpoints.save(1, state)
    checkpoints.wait()
    if rank in killed:
        saves = safetensors.torch.save

        def slow(*arguments: object, **named: object) -> bytes:
            (folder / f"writing-{rank}").touch()
            time.sleep(600)
            return saves(*arguments, **named)

        safetensors.torch.save = slow
    checkpoints.save(2, state)
    try:
        checkpoints.wait()
    except StoreError as error:
        (folder / f"heard-{rank}.txt").write_text(str(error))


# launching


def start(size: int, work: Work, folder: Path) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, size, work, folder)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def run(rank: int, size: int, work: Work, folder: Path) -> None:
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=LIMIT)
    work(rank, size, dist.new_group(backend="gloo", timeout=LIMIT), folder)


def finish(ranks: list[multiprocessing.Process]) -> list[int | None]:
    for process in ranks:
        process.join(200)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def kill(folder: Path, killed: list[int]) -> None:
    folder.mkdir()
    (folder / "killed").write_text(" ".join(map(str, killed)))
    ranks = start(2, die, folder)
    deadline = time.monotonic() + 120
    while not all((folder / f"writing-{rank}").exists() for rank in killed):
        assert time.monotonic() < deadline and all(process.is_alive() for process in ranks)
        time.sleep(0.01)
    for rank in killed:
        ranks[rank].kill()
    codes = finish(ranks)
    assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(2)], codes


OPENED, REMOVED = ("open", "os.mkdir", "os.rename"), ("os.remove", "os.rmdir")


def moments(folder: Path) -> None:
    """One process that is killed before its first access to the checkpoints, its second, ... until it is not."""
    base = folder / "base"
    with Checkpoints(base, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"W": torch.full((3,), float(step))})
    outcomes = []
    while not outcomes or outcomes[-1]["killed"]:
        copy = folder / str(len(outcomes))
        shutil.copytree(base, copy)
        process = multiprocessing.get_context("fork").Process(target=stop_at, args=(len(outcomes) + 1, copy))
        process.start()
        (code,) = finish([process])
        assert code in (0, -signal.SIGKILL), code
        outcomes.append({"killed": code != 0, "whole": read_and_remove(copy)})
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def stop_at(number: int, folder: Path) -> None:
    seen, lock = 0, threading.Lock()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        # what is removed is named relative to its folder
        if (event in OPENED and str(arguments[0]).startswith(str(folder))) or event in REMOVED:
            with lock:
                seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(2, {"W": torch.full((3,), 2.5)})
        checkpoints.save(3, {"W": torch.full((3,), 3.0)})


def read_and_remove(folder: Path) -> list[tuple[int, float]]:
    """Steps and values of all checkpoints, newest first; an error if one is not whole."""
    found = []
    checkpoints = Checkpoints(folder, keep=2)
    while last := checkpoints.last():
        (value,) = last.read_all()["W"].unique().tolist()
        found.append((last.step, value))
        shutil.rmtree(last.folder)
    return found


def main(scenario: str, folder: Path) -> None:
    if scenario == "spread":
        assert finish(start(4, save_and_read, folder)) == [0] * 4
    elif scenario == "fail":
        assert finish(start(2, fail, folder)) == [0] * 2
    elif scenario == "kill":
        kill(folder / "one", [1])
        kill(folder / "first", [0])
        kill(folder / "all", [0, 1])
    else:
        moments(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
