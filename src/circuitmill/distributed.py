"""Ranks and devices, and a watch over the other ranks: the only module that reads the variables a launcher sets.

A process that no launcher started is rank 0 of 1 and never initialises torch.distributed.

With more ranks, each one writes a heartbeat to the launcher's store, with what it is at, and reads those of the others.
A rank that fails says so there before it leaves. So every rank can tell in its last words who failed first and why, and
none waits for one that is gone, not even where a collective would never return.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from circuitmill import heartbeat
from circuitmill.errors import InterruptedRun, RankError
from circuitmill.heartbeat import Beat, Failure, Heart

TIMEOUT_S = 600.0
"""Seconds that a collective waits for the other ranks, unless `init` is told otherwise."""
BEAT_S = 1.0
"""Seconds between two heartbeats."""
BEATS_MISSED = 30
"""A rank that has not been heard of for so many of one's own beats is dead or frozen."""

_MISSED_AFTER_FAILURE = 5
"""The same, once a collective has failed."""
_GRACE = 10
"""Beats in which a rank may leave by itself, with what it has to say, once another one has failed."""
_LAST_WORDS = 3
"""Beats for which a rank that failed stays, so that the others can read why."""
_STALLED_SHARE = 0.8
"""Share of the timeout without a step after which rank 0 says who is where."""
_OF_COLLECTIVE = re.compile(r"gloo|nccl|c10d|connection (closed|reset)|broken pipe", re.IGNORECASE)
_TIMED_OUT = re.compile(r"time(d )?out", re.IGNORECASE)
_AGAIN = "run the same command again: it continues from the last checkpoint"


class _Here:
    """What the threads of this process share."""

    note: int | str = "the start"
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that work on the same stage."""

    rank: int
    size: int
    local_rank: int

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def current() -> Ranks:
    """This process's place, from the launcher's variables."""
    env = os.environ
    return Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def local_size() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device() -> torch.device:
    """The accelerator of this rank, or the CPU where there is none."""
    return torch.device("cuda", current().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def init(timeout_s: float | None = None) -> Ranks:
    """Join the process group if there is more than one rank; call once per process.

    Tensors on a CPU travel too where the ranks have accelerators.

    Args:
        timeout_s: Seconds that a collective waits for the other ranks; TIMEOUT_S if not given.

    Returns:
        This process's place.
    """
    ranks = current()
    if ranks.size > 1 and not dist.is_initialized():
        _Here.timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=_Here.timeout_s))
    return ranks


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def note(step: int | str) -> None:
    """Say what this rank is at: the number of a step, or a few words. Costs nothing; the next heartbeat carries it."""
    _Here.note = step


def watched(
    ranks: Ranks, *, beat_s: float = BEAT_S, beats_missed: int = BEATS_MISSED
) -> AbstractContextManager[object]:
    """Watch over the other ranks meanwhile; call after `init`. With one rank it does nothing.

    Ranks leave together: one that has finished, or was interrupted, waits until the others have or one of them failed.
    On the way out SIGTERM and SIGUSR1 are ignored from then on, because the process is already leaving.

    If another rank is dead or frozen, or failed and this one does not get away from a collective, the process ends
    with exit code 1 and says why on stderr.

    Args:
        ranks: This process among those that work on the same stage.
        beat_s: Seconds between two heartbeats.
        beats_missed: Of one's own, after which a rank that was not heard of is given up.

    Raises:
        RankError: a collective failed because another rank failed, died or stands still; it names that rank. What
            cannot be put down to another rank passes unchanged.
    """
    if ranks.size == 1:
        return nullcontext()
    env = os.environ
    run, restarts = env.get("TORCHELASTIC_RUN_ID", "none"), env.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = heartbeat.connect(address, port, run, restarts, timeout_s=BEATS_MISSED * BEAT_S)
    return _Watch(ranks, store, f"{address}:{port}", beat_s=beat_s, beats_missed=beats_missed)


def report_death(address: str, port: int, run: str, restarts: str, *, rank: int, how: str) -> list[int]:
    """Tell the ranks of a group that one of them ended without a word; for their launcher.

    Args:
        address: Of the group's store.
        port: Of the group's store.
        run: The launcher's name for the group.
        restarts: How often the launcher has started the group anew.
        rank: The one that ended.
        how: As a clause: "was killed by SIGKILL".

    Returns:
        The ranks that failed first: others, if they had said so before.
    """
    store = heartbeat.connect(address, port, run, restarts, timeout_s=_GRACE * BEAT_S)
    return heartbeat.post(store, _death([rank], how)).ranks


def _death(ranks: list[int], how: str, grace: int = _GRACE) -> Failure:
    fix = f"look for the cause in the system's log of that host (out of memory?), then {_AGAIN}"
    return Failure(ranks, how, "all ranks alive", fix, grace)


def _at(step: int | str) -> str:
    return f"step {step}" if isinstance(step, int) else str(step)


def _of_collective(error: BaseException | None) -> str | None:
    """What a collective said that failed, if that is the error or what it was raised from."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _OF_COLLECTIVE.search(text)):
            return text
        error = error.__cause__
    return None


class _Watch:
    def __init__(self, ranks: Ranks, store: dist.Store, where: str, *, beat_s: float, beats_missed: int) -> None:
        self._ranks, self._where, self._beat_s, self._beats_missed = ranks, where, beat_s, beats_missed
        self._heart = Heart(ranks.rank, ranks.size, store, beat_s, lambda: _Here.note)
        self._others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._silent = dict.fromkeys([*self._others, ranks.rank], 0)
        self._counts: dict[int, int] = {}
        self._known_for = self._lost_for = self._still_for = 0
        self._still_at: int | str = ""
        self._done = threading.Event()
        self._judge = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "_Watch":
        self._heart.start()
        self._judge.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        if error is None or isinstance(error, InterruptedRun):
            self._heart.leave("finished" if error is None else "stopped")
            self._until_all_left()
            self._done.set()
            self._heart.stop(self._beat_s * _LAST_WORDS)
            return
        # the judge goes on, so that a process that does not get away is ended
        explained = self._explained(error)
        self._heart.leave("failed")
        if self._heart.reported is not None:
            self._until_all_left(seconds=self._beat_s * _LAST_WORDS, despite_failure=True)
        self._heart.stop(self._beat_s * _LAST_WORDS)
        if explained is not None:
            raise explained from error

    def _until_all_left(self, seconds: float = float("inf"), *, despite_failure: bool = False) -> None:
        end = time.monotonic() + seconds
        while not self._all_left() and self._heart.lost is None and time.monotonic() < end:
            if self._heart.failure is not None and not despite_failure:
                return
            time.sleep(self._beat_s / 10)

    def _all_left(self) -> bool:
        beats = self._heart.others
        return all(rank in beats and beats[rank].left for rank in self._others)

    def _explained(self, error: BaseException) -> RankError | None:
        """What another rank has to do with an error; without one to blame it is reported as this rank's own."""
        text = _of_collective(error)
        if text is not None:
            for _ in range(_MISSED_AFTER_FAILURE + 2):
                if self._heart.failure is not None:
                    return self._error(self._heart.failure)
                if self._heart.lost is not None:
                    return self._lost()
                if dead := self._not_heard_of(_MISSED_AFTER_FAILURE):
                    return self._reported(_death(dead, f"not heard of for {_MISSED_AFTER_FAILURE * self._beat_s:g} s"))
                time.sleep(self._beat_s)
            if _TIMED_OUT.search(text):
                what = f"all ranks alive, but rank {self._ranks.rank} waited in vain: {self._table()}"
                expected = f"every rank at the same collective within {_Here.timeout_s:g} s"
                fix = f"see what the last of them was doing, or raise train.parallel.timeout_s; {_AGAIN}"
                return self._reported(Failure([], what, expected, fix, _GRACE))
        what = f"failed first, with {type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        fix = f"remove the cause on that rank, then {_AGAIN}"
        self._heart.report(Failure([self._ranks.rank], what, "all ranks to go on", fix, _GRACE))
        return None

    def _reported(self, failure: Failure) -> RankError:
        self._heart.report(failure)
        return self._error(failure)

    def _error(self, failure: Failure) -> RankError:
        who = ", ".join(self._who(rank) for rank in failure.ranks)
        return RankError(
            failure.expected,
            found=f"{who} {failure.what}".strip(),
            where=f"rank {self._ranks.rank}, at {_at(_Here.note)}",
            fix=failure.fix,
        )

    def _lost(self) -> RankError:
        return RankError(
            "an answer from the launcher of rank 0's node",
            found=f"none: it has ended or cannot be reached ({self._heart.lost or 'no answer'})".split("\n")[0],
            where=f"{self._where}, asked by rank {self._ranks.rank} at {_at(_Here.note)}",
            fix=f"look for the cause in the system's log of that host, then {_AGAIN}",
        )

    def _beat(self, rank: int) -> Beat | None:
        return self._heart.own if rank == self._ranks.rank else self._heart.others.get(rank)

    def _who(self, rank: int) -> str:
        beat = self._beat(rank)
        if beat is None:
            return f"rank {rank} (never heard of)"
        return f"rank {rank} (host {beat.host}, pid {beat.pid}, last heard of at {_at(beat.at)})"

    def _table(self) -> str:
        """Who is where: words first, then steps, lowest first."""
        beats = {rank: self._beat(rank) for rank in range(self._ranks.size)}

        def order(rank: int) -> tuple[int, int]:
            beat = beats[rank]
            return (beat.at if beat is not None and isinstance(beat.at, int) else -1), rank

        places: dict[str, list[int]] = {}
        for rank in sorted(beats, key=order):
            beat = beats[rank]
            place = "never heard of" if beat is None else beat.left or f"at {_at(beat.at)}"
            places.setdefault(place, []).append(rank)
        return "; ".join(f"{_named(ranks)} {place}" for place, ranks in places.items())

    def _not_heard_of(self, beats: int) -> list[int]:
        known = self._heart.others
        return [r for r in self._others if self._silent[r] >= beats and not (r in known and known[r].left)]

    def _run(self) -> None:
        while not self._done.wait(self._beat_s):
            self._count()
            reason = self._reason()
            if reason is not None and not self._done.is_set():
                self._say(f"RankError: {reason}")
                os._exit(RankError.exit_code)

    def _say(self, text: str) -> None:
        # not through logging, whose lock a thread may hold that never gives it back
        os.write(2, f"circuitmill: rank {self._ranks.rank}: {text}\n".encode())

    def _count(self) -> None:
        """Count one's own beats, not seconds: when all ranks were suspended for a while, none is to blame."""
        own = self._ranks.rank
        beating = self._heart.own.count != self._counts.get(own, 0)
        # while this rank's heart waits for the store it hears of nobody
        for rank in self._silent if beating else [own]:
            beat = self._beat(rank)
            count = beat.count if beat is not None else 0
            self._silent[rank] = self._silent[rank] + 1 if count == self._counts.get(rank, 0) else 0
            self._counts[rank] = count
        self._still_for = self._still_for + 1 if self._still_at == _Here.note else 0
        self._still_at = _Here.note
        if self._ranks.first and self._still_for == int(_Here.timeout_s * _STALLED_SHARE / self._beat_s):
            self._say(f"no step for {self._still_for * self._beat_s:.0f} s: {self._table()}")

    def _reason(self) -> RankError | None:
        """Why this process has to end now."""
        failure = self._heart.failure
        if failure is not None:
            self._known_for += 1
            return self._error(failure) if self._known_for > failure.grace else None
        if self._heart.lost is not None or self._silent[self._ranks.rank] >= self._beats_missed:
            self._lost_for += 1
            return self._lost() if self._lost_for > _MISSED_AFTER_FAILURE and not self._all_left() else None
        if dead := self._not_heard_of(self._beats_missed):
            self._heart.report(_death(dead, f"not heard of for {self._beats_missed * self._beat_s:g} s", grace=2))
        return None


def _named(ranks: Iterable[int]) -> str:
    """As "rank 3" or "ranks 0-3, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(runs) > 1 or len(runs[0]) > 1)} {text}"
