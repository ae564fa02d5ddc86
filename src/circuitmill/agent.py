"""The process that starts the ranks of one node and sees how they end; `launch` decides what it starts.

torchrun's agent with four differences. A rank that fails does not take the others with it at once: they have time to
find out who failed, or to finish their checkpoint. A rank that died without a word is announced to all ranks.
Signals go on to the ranks. The exit code of each is kept.
"""

import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.launcher.api import LaunchConfig

from circuitmill import distributed
from circuitmill.errors import InterruptedRun

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that the ranks get too; the first two have to be followed."""
ANNOUNCED_S = 3.0
"""Seconds for which the store outlives the announcement of a death, so that all ranks can read it."""
BARRIER_S = 30.0
"""Seconds that a node whose ranks succeeded waits for the other nodes; ranks leave together."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How the ranks of this node ended."""

    code: int = 0
    text: str = ""
    """About the rank that failed first, if one did."""


@dataclass
class _Record:
    """What has happened so far."""

    stop_s: float
    last_words_s: float
    ended: dict[int, int] = field(default_factory=dict)
    """Exit code of each rank that has ended, in that order; of one that a signal killed, its number below zero."""
    overdue: set[int] = field(default_factory=set)
    """Ranks that were killed here, because they did not leave."""
    asked_at: float | None = None
    """When SIGTERM or SIGINT came."""
    stopped_at: float | None = None
    """When a rank had stopped after a checkpoint."""
    announced_at: float | None = None
    """When a rank had failed."""
    blamed: list[int] = field(default_factory=list)
    """Ranks that failed first, here or elsewhere, by what the ranks say."""
    signals: list[signal.Signals] = field(default_factory=list)
    """That came and are yet to be passed on."""

    def first(self) -> tuple[int, int] | None:
        """The rank that failed first, and its exit code; one that stopped after a checkpoint only if all did that."""
        codes = [(rank, code) for rank, code in self.ended.items() if code]
        codes.sort(key=lambda pair: pair[0] not in self.blamed)
        return next((pair for pair in codes if pair[1] != InterruptedRun.exit_code), codes[0] if codes else None)

    def failed(self) -> bool:
        """Whether a rank ended otherwise than it should."""
        first = self.first()
        return first is not None and first[1] != InterruptedRun.exit_code

    def out_of_time(self) -> bool:
        """Whether the ranks that are left should have left by now."""
        if self.failed():
            return time.monotonic() - (self.announced_at or 0.0) > self.last_words_s
        since = [at for at in (self.asked_at, self.stopped_at) if at is not None]
        return bool(since) and time.monotonic() - min(since) > self.stop_s

    def note(self, number: int, frame: object) -> None:
        """Handler of the signals that are passed on."""
        self.signals.append(signal.Signals(number))
        if number != signal.SIGUSR1 and self.asked_at is None:
            self.asked_at = time.monotonic()


class Agent(LocalElasticAgent):
    """Starts the ranks of this node and watches them end."""

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs, record: _Record) -> None:
        super().__init__(spec, logs_specs=logs_specs, exit_barrier_timeout=BARRIER_S)
        self.record = record
        self._announcing: threading.Thread | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # until now there was nothing to pass a signal on to, and it ended this process
        for number in PASSED_ON:
            signal.signal(number, self.record.note)
        return super()._start_workers(worker_group)  # type: ignore[call-arg]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        record = self.record
        running = self._look(worker_group)
        while record.signals:
            number = record.signals.pop(0)
            for pid in running.values():
                os.kill(pid, number)
        if record.out_of_time():
            for rank, pid in running.items():
                record.overdue.add(rank)
                os.killpg(pid, signal.SIGKILL)
        if running or self._telling(worker_group):
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)  # type: ignore[call-arg]

    def _telling(self, group: WorkerGroup) -> bool:
        """Whether ranks of other nodes may still want to read who failed; node 0 has the store."""
        if self._announcing is None or self.record.announced_at is None:
            return False
        fresh = time.monotonic() - self.record.announced_at < ANNOUNCED_S
        return fresh and (group.group_world_size != 1 or self._announcing.is_alive())

    def _look(self, group: WorkerGroup) -> dict[int, int]:
        """Process of each rank that is still running; notes how the others ended without reaping them."""
        record, running, new = self.record, {}, {}
        for worker in group.workers:
            if worker.global_rank in record.ended:
                continue
            found = os.waitid(os.P_PID, worker.id, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                running[worker.global_rank] = worker.id
            else:
                killed = found.si_code != os.CLD_EXITED
                new[worker.global_rank] = -found.si_status if killed else found.si_status
        # of those that ended since the last look the likely cause comes first: 1 is what the others end with
        record.ended |= dict(sorted(new.items(), key=lambda pair: (pair[1] >= 0, pair[1] in (0, 1), pair[0])))
        if record.stopped_at is None and InterruptedRun.exit_code in new.values():
            record.stopped_at = time.monotonic()
        if record.announced_at is None and record.failed():
            record.announced_at = time.monotonic()
            self._announcing = threading.Thread(target=self._announce, args=(group,), daemon=True)
            self._announcing.start()
            for pid in running.values():  # one that was stopped would never leave
                os.kill(pid, signal.SIGCONT)
        return running

    def _announce(self, group: WorkerGroup) -> None:
        rank, code = self.record.first() or (0, 0)
        address, port, run = str(group.master_addr), int(str(group.master_port)), self._rdzv_handler.get_run_id()
        try:
            self.record.blamed = distributed.report_death(address, port, run, "0", rank=rank, how=_how(code))
        except RuntimeError as error:
            _log.warning("could not tell the other ranks that rank %d %s: %s", rank, _how(code), error)


def run(arguments: list[str], *, stop_s: float, last_words_s: float) -> Ending:
    """Start ranks and wait for all of them to end.

    Args:
        arguments: Of torchrun.
        stop_s: Seconds that ranks have to leave after a request to stop.
        last_words_s: Seconds that ranks have to leave after one has failed.
    """
    # what torchrun, and c10d when the store goes, say about the end of ranks is said better here
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config, program, program_arguments = torchrun.config_from_args(torchrun.parse_args(arguments))
    record = _Record(stop_s, last_words_s)
    agent = _agent(config, program, program_arguments, record)
    try:
        agent.run()
    except SignalException as error:
        return Ending(1, f"ended the ranks of {socket.gethostname()} because of {error.sigval.name}")
    return _ending(record, {worker.global_rank: worker.id for worker in agent.get_worker_group().workers})


def _agent(config: LaunchConfig, program: Any, arguments: list[str], record: _Record) -> Agent:
    """As torch.distributed.launcher.launch_agent makes its own."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    address, _, port = config.rdzv_endpoint.rpartition(":") if config.rdzv_backend == "static" else ("", "", "0")
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=program,
        args=tuple(arguments),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=address or None,
        master_port=int(port) or None,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
    )
    return Agent(spec, config.logs_specs or DefaultLogsSpecs(), record)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _ending(record: _Record, pids: dict[int, int]) -> Ending:
    first = record.first()
    if first is None:
        return Ending()
    rank, code = first
    elsewhere = [other for other in record.blamed if other not in record.ended]
    after = f", after rank {elsewhere[0]} on another node" if elsewhere else ""
    text = f"rank {rank} on {socket.gethostname()} (pid {pids[rank]}) "
    if rank in record.overdue:
        return Ending(1, text + "did not leave in time and was killed")
    if code == InterruptedRun.exit_code:
        return Ending(code, f"{text}{_how(code)}, as all others here: run the same command again to continue")
    return Ending(code if code > 0 else 1, text + _how(code) + after)
