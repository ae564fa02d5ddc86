"""Forked ranks that train as stage train does, from memory, and what they leave behind, compared.

One interpreter imports torch and forks the ranks; a single one never initialises torch.distributed.
"""

import datetime
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.cases import BATCH, CASES, Doubles
from tests.training.helpers import Memory, batches, scaling

from circuitmill import distributed
from circuitmill.config.train import MonitorConfig, TrainConfig
from circuitmill.core.codecs import StoredBatch
from circuitmill.distributed import Ranks
from circuitmill.errors import InterruptedRun
from circuitmill.stages import train as stage
from circuitmill.stores.checkpoints import Checkpoints, Saved
from circuitmill.stores.metrics import read_metrics
from circuitmill.training.batches import Batches
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.parallel.placement import Placement
from circuitmill.training.state import TrainState

LIMIT = datetime.timedelta(seconds=120)
_restore = stage._restore
NOT_REPEATED = ("tokens_per_second", "data_wait_share", "peak_memory_bytes", "wire_bytes", "wire_bytes_per_step")
"""Keys of a row that are about the process."""
Tensors = dict[str, torch.Tensor]


def variant(case: str, steps: int, **optimizer: Any) -> TrainConfig:
    """A case with a row of metrics per step, held-out figures, some checkpoints, and features that fire seldom."""
    cfg = CASES[case]
    return replace(
        cfg,
        tokens=steps * BATCH,
        init=replace(cfg.init, l0=1.0),
        warmup_tokens=4 * BATCH,
        dead_tokens=4 * BATCH,
        checkpoint_tokens=5 * BATCH,
        checkpoint_l0=(5.0, 4.3),
        monitor=MonitorConfig(log_tokens=BATCH, heldout_tokens=2 * BATCH, heldout_every_tokens=7 * BATCH),
        optimizer=replace(cfg.optimizer, **optimizer),
    )


# one rank


class Source(Memory):
    """Says in a file which batches were asked for."""

    def __init__(self, layout: Layout, path: Path) -> None:
        super().__init__(BATCH, layout.rows(BATCH))
        self._file = path.open("w", buffering=1)

    def batch(self, index: int) -> StoredBatch:
        self._file.write(f"{index}\n")
        return super().batch(index)


class Doubled(Doubles):
    def __init__(self, cfg: TrainConfig, layout: Layout, source: Source) -> None:
        self._batches = batches(cfg, layout, source)


class Data:
    """What stage train needs of a cache."""

    inputs: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, asked: Path, *, exact: bool) -> None:
        self.scaling, self._asked, self._exact = scaling(), asked, exact

    def batches(self, cfg: TrainConfig, layout: Layout, stack: ExitStack) -> Batches | Doubles:
        source = Source(layout, self._asked)
        return stack.enter_context((Doubled if self._exact else batches)(cfg, layout, source))

    def heldout(self, *, tokens: int, batch_tokens: int, key: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in range(tokens // batch_tokens):
            x, y = Memory(batch_tokens).pair(10**6 + index)
            pair = self.scaling.inputs(x), self.scaling.outputs(y)
            yield tuple(side.double() for side in pair) if self._exact else pair


@dataclass(frozen=True)
class Orders:
    """What a rank is to do besides training."""

    number: int = 0
    """Of the start, in this folder."""
    exact: bool = False
    """In float64."""
    stop_after: int = 0
    """Finished steps after which it is asked to stop."""
    hold_at: int = -1
    """Step before which ranks that are to be killed wait for it."""
    held: tuple[int, ...] = ()
    """These ranks."""
    doing: Any = None
    """Shared with the parent: the step that each rank is at."""
    copy: Path | None = None
    """Where the state is saved again as soon as it has been read."""


def train(cfg: TrainConfig, layout: Layout, folder: Path, orders: Orders) -> None:
    """Begin or continue, as far as the orders say."""
    rank, at = layout.ranks.rank, 0

    def note(step: int) -> None:
        nonlocal at
        at = step
        journal.write(f"{step}\n")
        if orders.doing is not None:
            orders.doing[rank] = step
        if step == orders.hold_at and rank in orders.held:
            time.sleep(LIMIT.total_seconds())
            raise TimeoutError(f"rank {rank} was not killed")

    class Stop(stage.StopRequest):
        def __bool__(self) -> bool:
            return at + 1 == orders.stop_after

    def restore(state: TrainState, saved: Saved, layout: Layout) -> None:
        _restore(state, saved, layout)
        if orders.copy is not None:
            place = {"rank": rank, "size": layout.ranks.size, "group": layout.background}
            with Checkpoints(orders.copy, keep=1, **place) as again:
                again.save(state.step, Placement(state.transcoder, layout).entries(state.tensors()))

    distributed.note, stage.StopRequest, stage._restore = note, Stop, restore
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64 if orders.exact else torch.float32)
    data: Any = Data(folder / f"asked-{orders.number}-{rank}", exact=orders.exact)
    with (folder / f"steps-{orders.number}-{rank}").open("w", buffering=1) as journal:
        try:
            stage._train(cfg, data, folder, layout)
        except InterruptedRun:
            assert at + 1 == orders.stop_after
        else:
            assert not orders.stop_after


# groups of ranks

Work = Callable[[Ranks], None]


def start(size: int, folder: Path, work: Work) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    meeting.touch()
    ranks = [context.Process(target=run, args=(rank, size, meeting, work), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def run(rank: int, size: int, meeting: Path, work: Work) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    if size > 1:
        store = dist.FileStore(str(meeting), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LIMIT)
    try:
        work(distributed.current())
    except Exception as error:
        meeting.with_name(f"{meeting.name}-error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    assert dist.is_initialized() == (size > 1)


def finish(ranks: Sequence[multiprocessing.Process]) -> list[int | None]:
    for process in ranks:
        process.join(200)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def wait_for(condition: Callable[[], bool], ranks: Sequence[multiprocessing.Process]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and all(process.is_alive() for process in ranks)
        time.sleep(2e-4)


# comparing


def rows(folder: Path) -> list[dict]:
    """Metrics without what is about the process."""
    return [
        {key: value for key, value in row.items() if key not in NOT_REPEATED}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def last_state(folder: Path) -> Tensors:
    """Whole tensors of the newest checkpoint of a folder of checkpoints."""
    saved = Checkpoints(folder, keep=2).last()
    assert saved is not None
    return saved.read_all()


def unequal(one: Tensors, other: Tensors) -> list[str]:
    """Names of tensors whose bits differ."""

    def bits(tensors: Tensors, name: str) -> tuple | None:
        if name not in tensors:
            return None
        value = tensors[name].contiguous()
        return value.shape, value.dtype, value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return sorted(name for name in one | other if bits(one, name) != bits(other, name))
