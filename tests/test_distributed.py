"""Ranks and the watch over them, without other processes; tests/distributed has those."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from circuitmill import cli, distributed, heartbeat
from circuitmill.distributed import Ranks, _named, _Watch
from circuitmill.errors import InterruptedRun, RankError, StoreError
from circuitmill.heartbeat import Beat, Failure, Heart

READ_ERROR = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9601: Connection reset by peer"
WAITED = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
FAILURE = Failure([2], "failed first, with StoreError: half a chunk", "all ranks to go on", "mend it", 10)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Groups that were asked for, of rank 1 of 2."""
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    calls: list[tuple] = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda *given, timeout: calls.append((*given, timeout.total_seconds()))
    )
    monkeypatch.setattr(distributed.torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(distributed._Here, "timeout_s", 600.0)
    return calls


@pytest.mark.parametrize(
    ("cuda", "timeout_s", "expected"),
    [(False, None, [("gloo", 600.0)]), (True, 7.5, [1, ("cpu:gloo,cuda:nccl", 7.5)])],
)
def test_group_carries_tensors_of_every_device(cuda, timeout_s, expected, joined, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: cuda)
    assert distributed.init(timeout_s) == Ranks(1, 2, 1)
    assert joined == expected


def test_one_rank_joins_and_watches_nothing(monkeypatch: pytest.MonkeyPatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(key, raising=False)
    ranks = distributed.init()
    assert ranks == Ranks(0, 1, 0) and ranks.first and not dist.is_initialized()
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="Connection reset"), distributed.watched(ranks):
        assert threading.active_count() == threads
        raise RuntimeError(READ_ERROR)
    distributed.shutdown()


def test_a_stage_runs_watched_and_train_waits_as_long_as_configured(joined, monkeypatch: pytest.MonkeyPatch, capsys):
    from circuitmill.stages import train

    def fail(cfg, **inputs):
        raise RankError("all ranks alive", found="rank 0 was killed", where="rank 1", fix="run it again")

    monkeypatch.setattr(train, "run", fail)
    watched = []
    monkeypatch.setattr(distributed, "watched", lambda ranks: watched.append(ranks) or _Nothing())
    command = [
        "train",
        "experiment=tiny",
        "train.parallel.timeout_s=33",
        "--tokenize",
        "t",
        "--cache",
        "c",
        "--out",
        "x",
    ]
    assert cli.main(command) == 1
    assert joined[-1][-1] == 33.0 and watched == [Ranks(1, 2, 1)]
    assert "circuitmill train: RankError: all ranks alive; found rank 0 was killed" in capsys.readouterr().err


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *given):
        return None


def watch(size: int = 3) -> _Watch:
    """Rank 0's, whose threads were not started."""
    made = _Watch(Ranks(0, size, 0), dist.HashStore(), "host:1", beat_s=0.001, beats_missed=30)
    made._heart.others = {rank: Beat("node", 100 + rank, count=5, at=7 + rank) for rank in range(1, size)}
    return made


@pytest.mark.parametrize(
    "error", [StoreError("a", found="b", where="c", fix="d"), ValueError("no"), RuntimeError("shape")]
)
def test_what_arises_here_passes_and_is_reported(error: Exception):
    made = watch()
    assert made._explained(error) is None
    assert made._heart.reported.ranks == [0]
    assert made._heart.reported.what.startswith(f"failed first, with {type(error).__name__}: ")


@pytest.mark.parametrize("text", [READ_ERROR, WAITED])
def test_a_failed_collective_is_put_down_to_the_rank_that_failed_first(text: str):
    made = watch()
    made._heart.failure = FAILURE
    error = made._explained(RuntimeError(text))
    assert isinstance(error, RankError) and error.exit_code == 1
    assert (
        error.found
        == "rank 2 (host node, pid 102, last heard of at step 9) failed first, with StoreError: half a chunk"
    )
    assert error.fix == "mend it" and made._heart.reported is None


def test_an_error_of_ours_that_a_failed_collective_led_to_is_put_down_too():
    made = watch()
    made._heart.failure = FAILURE
    ours = StoreError("all ranks at the checkpoint", found=READ_ERROR, where="c", fix="d")
    assert made._explained(ours) is None
    ours.__cause__ = RuntimeError(READ_ERROR)
    assert isinstance(made._explained(ours), RankError)


def test_a_failed_collective_is_put_down_to_ranks_that_are_not_heard_of():
    made = watch(4)
    del made._heart.others[3]
    made._silent[1] = made._silent[3] = 5
    error = made._explained(RuntimeError(READ_ERROR))
    assert error.found.startswith(
        "rank 1 (host node, pid 101, last heard of at step 8), rank 3 (never heard of) not heard"
    )
    assert made._heart.reported.ranks == [1, 3]


def test_a_rank_that_has_left_is_not_missed():
    made = watch()
    made._silent[1] = 99
    made._heart.others[1] = Beat("node", 101, left="finished")
    assert made._explained(RuntimeError(READ_ERROR)) is None


def test_a_collective_that_timed_out_lists_who_is_where_last_first():
    made = watch(5)
    made._heart.others[1] = Beat("node", 1, at=3)
    made._heart.others[2] = Beat("node", 1, at="measuring")
    made._heart.others[3] = Beat("node", 1, at=3)
    made._heart.others[4] = Beat("node", 1, left="finished", at=9)
    made._heart.own = Beat("node", 1, at=5)
    error = made._explained(RuntimeError(WAITED))
    assert error.found.endswith("in vain: rank 2 at measuring; ranks 1, 3 at step 3; rank 0 at step 5; rank 4 finished")
    assert error.expected == "every rank at the same collective within 600 s"


def test_a_lost_connection_with_all_ranks_alive_passes_unchanged():
    made = watch()
    assert made._explained(RuntimeError(READ_ERROR)) is None
    assert "Connection reset by peer" in made._heart.reported.what


def test_a_store_that_is_gone_is_named():
    made = watch()
    made._heart.lost = RuntimeError("Broken pipe\nframe #0")
    error = made._explained(RuntimeError(READ_ERROR))
    assert error.found == "none: it has ended or cannot be reached (Broken pipe" and error.where.startswith("host:1")


def beats(made: _Watch, rounds: int, *, still: int = 0) -> list[RankError | None]:
    """Verdicts while all ranks but one beat."""
    verdicts = []
    for _ in range(rounds):
        made._heart.own = _next(made._heart.own)
        made._heart.others = {rank: beat if rank == still else _next(beat) for rank, beat in made._heart.others.items()}
        made._count()
        verdicts.append(made._reason())
    return verdicts


def _next(beat: Beat) -> Beat:
    return Beat(beat.host, beat.pid, beat.count + 1, beat.at, beat.left)


def test_a_rank_that_misses_beats_is_reported_and_ends_this_one_soon():
    made = watch()
    assert beats(made, 30, still=2) == [None] * 30 and made._heart.reported is None
    beats(made, 1, still=2)
    assert made._heart.reported.ranks == [2]
    made._heart.failure = made._heart.reported
    *early, last = beats(made, 3, still=2)
    assert early == [None, None] and "rank 2 (host node, pid 102, last heard of at step 9) not heard" in last.found


def test_ranks_that_were_suspended_together_are_not_to_blame():
    """However long it was: what counts is one's own beats."""
    made = watch()
    assert beats(made, 100) == [None] * 100 and made._heart.reported is None


def test_a_failure_leaves_time_to_leave():
    made = watch()
    made._heart.failure = FAILURE
    *early, last = beats(made, 11)
    assert early == [None] * 10 and isinstance(last, RankError)


def test_a_store_that_does_not_answer_ends_this_rank():
    made = watch()
    verdicts = []
    for _ in range(37):
        made._count()
        verdicts.append(made._reason())
    assert isinstance(verdicts[-1], RankError) and verdicts[29] is None
    assert "no answer" in verdicts[-1].found


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 2, 1], "ranks 0-2, 5"), ([1, 3], "ranks 1, 3")],
)
def test_names_of_ranks(ranks: list[int], expected: str):
    assert _named(ranks) == expected


def test_the_first_failure_is_the_one_that_counts():
    store = dist.HashStore()
    assert heartbeat.post(store, FAILURE) == FAILURE
    assert heartbeat.post(store, Failure([0], "failed too", "", "", 10)) == FAILURE


@pytest.fixture
def hearts() -> Iterator[list[Heart]]:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    made = [
        Heart(rank, 2, heartbeat.connect("localhost", server.port, "run", "0", timeout_s=10.0), 0.01, lambda: 41)
        for rank in range(2)
    ]
    for heart in made:
        heart.start()
    yield made
    for heart in made:
        heart.stop(10.0)
        assert not heart.is_alive()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_hearts_hear_of_each_other(hearts: list[Heart]):
    one, two = hearts
    wait_for(lambda: 1 in one.others and one.others[1].count > 3)
    assert one.others[1].at == 41 and one.others[1].left == "" and 1 not in two.others
    two.leave("finished")
    wait_for(lambda: one.others[1].left == "finished")
    one.report(FAILURE)
    wait_for(lambda: two.failure is not None)
    assert two.failure == FAILURE and one.lost is None


def test_a_launcher_s_report_yields_to_what_a_rank_said(monkeypatch: pytest.MonkeyPatch):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    report = {"address": "localhost", "port": server.port, "run": "run", "restarts": "0"}
    assert distributed.report_death(**report, rank=1, how="was killed by SIGKILL") == [1]
    assert distributed.report_death(**report, rank=0, how="ended with exit code 1") == [1]


def test_an_interrupted_run_is_not_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed.signal, "signal", lambda *given: None)
    made = watch(2)
    made._heart.others[1] = Beat("node", 101, left="stopped")
    made.__enter__()
    with pytest.raises(InterruptedRun):
        _leave(made, InterruptedRun("all", found="some", where="here", fix="again"))
    assert made._heart.reported is None and made._heart.own.left == "stopped" and not made._heart.is_alive()


def _leave(made: _Watch, error: Exception) -> None:
    try:
        raise error
    except InterruptedRun as raised:
        made._others = []  # nobody beats in this process but rank 0
        made.__exit__(type(raised), raised, None)
        raise
