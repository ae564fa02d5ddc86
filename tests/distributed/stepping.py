"""A rank that steps as the training loop does, until something happens to one of the ranks.

python -m tests.distributed.stepping FOLDER WHAT       (a launcher's variables decide about the group)

It writes `FOLDER/<rank>.pid`, `FOLDER/<rank>.steps` with a line per step, and when it stops on request
`FOLDER/<rank>.left` with the step after which it left.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from circuitmill import distributed
from circuitmill.errors import CircuitmillError, InterruptedRun, StoreError
from circuitmill.training.interrupt import StopRequest

VICTIM, AT = 1, 20
LAST = 2000


def happen(what: str) -> None:
    """To this rank."""
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "exits":
        os._exit(7)
    elif what == "raises":
        raise StoreError("a whole chunk", found="half of one", where="chunk-7", fix="cache it again")
    elif what == "asleep":
        time.sleep(60)
    elif what in ("SIGTERM", "SIGUSR1"):
        os.kill(os.getpid(), signal.Signals[what])


def step_until_asked(folder: Path, rank: int, what: str) -> None:
    """A request to stop that any rank got ends all."""
    with StopRequest() as stop, (folder / f"{rank}.steps").open("w", buffering=1) as steps:
        for step in range(LAST):
            distributed.note(step)
            steps.write(f"{step}\n")
            if rank == VICTIM and step == AT:
                happen(what)
            asked = torch.tensor([float(bool(stop))])
            dist.all_reduce(asked)
            if asked:
                # a checkpoint takes one rank longer than the other
                time.sleep(1.5 * rank)
                (folder / f"{rank}.left").write_text(str(step))
                raise InterruptedRun(f"{LAST} steps", found=f"a request after {step}", where="here", fix="run it again")
            time.sleep(0.02)


def main() -> int:
    """Ends as the command line does."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    ranks = distributed.init(timeout_s=15.0 if what == "asleep" else None)
    (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
    try:
        with distributed.watched(ranks, beat_s=0.3, beats_missed=20):
            step_until_asked(folder, ranks.rank, what)
    except CircuitmillError as error:
        sys.stderr.write(f"rank {ranks.rank} says {type(error).__name__}: {error}\n")
        return error.exit_code
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
