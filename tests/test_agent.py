"""Which rank is to blame, how long the others have, and what a launcher says at the end."""

import signal
import time

import pytest

from circuitmill.agent import Ending, _ending, _Record


def record(*ended: tuple[int, int], **changes) -> _Record:
    return _Record(stop_s=120.0, last_words_s=45.0, ended=dict(ended), **changes)


@pytest.mark.parametrize(
    ("ended", "blamed", "first"),
    [
        ([(0, 0), (1, 0)], [], None),
        ([(1, 75), (0, 75)], [], (1, 75)),
        ([(1, 75), (0, 1)], [], (0, 1)),
        ([(2, 0), (1, -9), (0, 1)], [], (1, -9)),
        ([(0, 1), (1, 2)], [1], (1, 2)),
        ([(0, 1), (1, 1)], [7], (0, 1)),
    ],
)
def test_first_failure(ended, blamed, first):
    assert record(*ended, blamed=blamed).first() == first
    assert record(*ended).failed() == (first is not None and first[1] != 75)


def test_time_to_leave():
    now = time.monotonic()
    assert not record().out_of_time()
    assert not record(asked_at=now - 100).out_of_time()
    assert record(asked_at=now - 130).out_of_time()
    # a checkpoint takes the others longer
    assert not record((0, 75), stopped_at=now - 100).out_of_time()
    assert record((0, 75), stopped_at=now - 130).out_of_time()
    # a failure ends the wait sooner, counted from the failure
    assert not record((0, 1), announced_at=now - 30, asked_at=now - 100).out_of_time()
    assert record((0, 1), announced_at=now - 50).out_of_time()


def test_usr1_sets_no_limit():
    """The scheduler that sends it sends what it thinks right later."""
    made = record()
    made.note(signal.SIGUSR1, None)
    assert made.signals == [signal.SIGUSR1] and made.asked_at is None
    made.note(signal.SIGTERM, None)
    assert made.asked_at is not None


@pytest.mark.parametrize(
    ("made", "code", "words"),
    [
        (record((0, 0), (1, 0)), 0, ""),
        (
            record((0, 75), (1, 75)),
            75,
            "(pid 100) ended with exit code 75, as all others here: run the same command again to continue",
        ),
        (record((1, -9), (0, 1)), 1, "(pid 101) was killed by SIGKILL"),
        (record((1, 2), (0, 1)), 2, "(pid 101) ended with exit code 2"),
        (record((0, 1), (1, 1), blamed=[3]), 1, "(pid 100) ended with exit code 1, after rank 3 on another node"),
        (record((0, 75), (1, -9), overdue={1}), 1, "(pid 101) did not leave in time and was killed"),
    ],
)
def test_ending(made: _Record, code: int, words: str):
    ending = _ending(made, {0: 100, 1: 101})
    assert ending.code == code
    assert ending.text.endswith(words) and (ending == Ending()) == (code == 0)
