"""Heartbeats of the ranks of a group, through the launcher's store.

Keys: `beat/<rank>` has a count that rises, what the rank is at, its host and process, and whether it has left;
`failure` has the first failure in the group, which whoever writes it first decides.
"""

import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FAILURE = "failure"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    host: str
    pid: int
    count: int = 0
    at: int | str = "the start"
    left: str = ""
    """How, if it has nothing more to do."""


@dataclass(frozen=True)
class Failure:
    """Why a group cannot go on."""

    ranks: list[int]
    """Whose it is; none if no rank in particular."""
    what: str
    """As a clause about them."""
    expected: str
    fix: str
    grace: int
    """Beats in which the other ranks may leave by themselves."""


def connect(address: str, port: int, run: str, restarts: str, *, timeout_s: float) -> dist.Store:
    """A client of its own to the store of a group.

    Args:
        address: Of the store.
        port: Of the store.
        run: The launcher's name for the group.
        restarts: How often the launcher has started the group anew.
        timeout_s: Seconds to wait for a connection.
    """
    client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return dist.PrefixStore(f"circuitmill/{run}/{restarts}", client)


def post(store: dist.Store, failure: Failure) -> Failure:
    """Tell the group of a failure, unless there was one before; returns the first."""
    return Failure(**_read(store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))


class Heart(threading.Thread):
    """Writes this rank's beats and reads the others'.

    Nobody else uses its store: one that stands still blocks its client for ever, and only this thread may be lost to
    it.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, beat_s: float, at: Callable[[], int | str]) -> None:
        super().__init__(name="heart", daemon=True)
        self.own = Beat(socket.gethostname(), os.getpid())
        self.others: dict[int, Beat] = {}
        """The newest beat of each that was heard of."""
        self.failure: Failure | None = None
        self.reported: Failure | None = None
        self.lost: RuntimeError | None = None
        """How the store was lost."""
        self._rank, self._store, self._beat_s, self._at = rank, store, beat_s, at
        self._known: list[int] = []
        self._unknown = [other for other in range(size) if other != rank]
        self._left, self._stopping, self._wake = "", False, threading.Event()

    def report(self, failure: Failure) -> None:
        """Tell the group of a failure, unless there was one before."""
        self.reported = failure
        self._wake.set()

    def leave(self, how: str) -> None:
        """Say that this rank has nothing more to do, and look at the others more often."""
        self._left, self._beat_s = how, self._beat_s / 10
        self._wake.set()

    def stop(self, seconds: float) -> None:
        """Beat once more and end, or give up waiting for that."""
        self._stopping = True
        self._wake.set()
        self.join(seconds)

    def run(self) -> None:
        """Beat until told to stop, or until the store is gone."""
        try:
            last = False
            while not last:
                last = self._stopping
                self._exchange()
                self._wake.wait(0 if last else self._beat_s)
                self._wake.clear()
        except RuntimeError as error:  # those of torch.distributed are
            self.lost = error

    def _exchange(self) -> None:
        if self.failure is None and self.reported is not None:
            self.failure = post(self._store, self.reported)
        self.own = replace(self.own, count=self.own.count + 1, at=self._at(), left=self._left)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self.own)))
        if self.failure is None and self._store.check([_FAILURE]):
            self.failure = Failure(**_read(self._store.get(_FAILURE)))
        found = [other for other in self._unknown if self._store.check([f"beat/{other}"])]
        self._unknown = [other for other in self._unknown if other not in found]
        self._known += found
        # asking for nothing is an error
        texts = self._store.multi_get([f"beat/{other}" for other in self._known]) if self._known else []
        self.others = {other: Beat(**_read(text)) for other, text in zip(self._known, texts, strict=True)}


def _read(text: bytes) -> dict[str, Any]:
    return json.loads(text)
