"""Activations that are never stored: a producer process runs the model and hands them over in shared memory.

`LiveBlocks` is to `BatchSource` what the shards of a cache are. Block b of n is the sequences b, b + n, b + 2n, ... of
a split: neighbours, which may be of one document, are in different blocks, and every block has its share of every part
of the corpus. What a block holds follows from the tokens and the model alone, so that batches have the guarantees of
stored ones.

Each reading thread takes a slot of the memory, writes a block's token ids into it and a request into the slot's pipe;
the producer runs the model on them, writes the activations into the same slot and answers; the thread copies them out
and gives the slot back. Whoever waits for the producer also waits for its end, so that its death is noticed at once
and without polling. The producer ends when the pipes close, which they do however this process ends.

Under torchrun every rank has a producer of its own, on its own device, which computes all blocks although the rank
keeps its rows of a batch alone: right, but with N ranks the model's work is done N times.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int32, Shaped

from circuitmill import errors
from circuitmill.config.activations import ActivationsConfig, Hookpoint
from circuitmill.config.model import ModelConfig
from circuitmill.core.codecs import Channels, Codec
from circuitmill.errors import CircuitmillError, ClientError, ConfigError, UpstreamError
from circuitmill.lm.live import token_activations
from circuitmill.lm.ring import Ring, Slot
from circuitmill.lm.sites import Sites, load_sites

SLOTS = 2
"""As many as there are reading threads: one block is computed while another is copied out."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""What a terminal or a scheduler sends to all processes of a job; the trainer decides what follows."""
_PATIENCE = 5.0
"""Seconds that a producer may take to end once it has closed its pipes."""


@dataclass(frozen=True)
class ExpectedModel:
    """Which activations to compute, where, and what their model or models must turn out to be."""

    model: ModelConfig
    toyworld: Path | None
    """Output folder of stage toyworld; needed for the embedded model only."""
    device: str
    n_layers: int
    """Places at which activations are taken: layers of the model, or of both."""
    d_model: int
    digest: str
    """Of the model that the run was calibrated with."""
    hookpoint: Hookpoint = "mlp"
    layers: tuple[int, ...] | None = None
    second_model: ModelConfig | None = None
    second_digest: str = ""

    @classmethod
    def of(
        cls, cfg: ActivationsConfig, counts: Mapping[str, Any], *, toyworld: Path | None, device: torch.device
    ) -> "ExpectedModel":
        """What the configuration of stage cache asks for, with what its manifest's counts say of the models."""
        return cls(
            cfg.model,
            toyworld,
            str(device),
            n_layers=counts["n_layers"],
            d_model=counts["d_model"],
            digest=counts["model_digest"],
            hookpoint=cfg.hookpoint,
            layers=cfg.layers,
            second_model=cfg.second_model,
            second_digest=counts.get("second_model_digest", ""),
        )

    @property
    def codec(self) -> Codec:
        """Activations as they leave the models."""
        models = (self.model, self.second_model or self.model)
        bits = all(cfg.dtype == "bfloat16" for cfg in models)
        return Codec("bf16" if bits else "float32", self.n_layers, self.d_model)

    def load(self) -> Sites:
        """The model or models.

        Raises:
            ConfigError: a model or tokenizer cannot be loaded.
            StoreError: a weight file is damaged.
            UpstreamError: it is another one, or the embedded model is not there.
        """
        sites = load_sites(self, toyworld=self.toyworld, device=torch.device(self.device))
        expected = [self.digest, self.second_digest][: len(sites.lms)]
        if (list(sites.digests.values()), sites.n_layers, sites.d_model) != (expected, self.n_layers, self.d_model):
            names = " and ".join(digest[:12] for digest in expected)
            found = " and ".join(digest[:12] for digest in sites.digests.values())
            raise UpstreamError(
                f"model {names} of {self.n_layers} layers and d_model {self.d_model}, as it was calibrated",
                found=f"{found} of {sites.n_layers} layers and d_model {sites.d_model}",
                where=f"cache.model.name: {sites.name}",
                fix="run stages calibrate and cache again with this model",
            )
        return sites


@dataclass(frozen=True)
class _Request:
    """Compute the block whose token ids are in the slot."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class _Failure:
    """An error on its way to another process."""

    kind: str
    expected: str
    found: str
    where: str
    fix: str

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        if isinstance(error, CircuitmillError):
            return cls(type(error).__name__, error.expected, str(error.found), str(error.where), error.fix)
        return cls(
            ClientError.__name__,
            "activations from the process that runs the language model",
            f"{type(error).__name__}: {error}",
            "cache.mode: stream",
            "if memory is short, lower cache.batch_sequences; else look whether stage calibrate meets the same error",
        )

    def error(self) -> CircuitmillError:
        return getattr(errors, self.kind)(self.expected, found=self.found, where=self.where, fix=self.fix)


class LiveBlocks:
    """Blocks of a `BatchSource` that a producer process computes. A context manager: the process lives inside it.

    Enter it after whatever reads from it (`BatchSource`, and what reads ahead from that). It is then left first, which
    ends the producer and all waiting for it; the readers would otherwise wait for a whole pool.

    Besides the token ids of the split (4 bytes a token) memory holds `n_slots` blocks. No signal but SIGKILL ends the
    producer.

    Args:
        model: What the producer loads.
        tokens: Of the split, as far as the run may use it.
        bos_id: The token whose activations are left out.
        batch_sequences: At most so many sequences in a block, which is one forward pass.
        outputs: Whether MLP outputs are handed over beside the inputs; with hookpoint mlp alone.
        n_slots: Blocks in shared memory; more than there are reading threads are of no use.
        threads: Of the producer on a CPU. None takes half of those that this process uses: both work at the same
            time, and while the trainer waits for the producer the cores are free.

    Attributes:
        codec, channels, sizes, strata: See `stores.batches.Blocks`.

    Raises:
        ConfigError: outputs of another hookpoint.
    """

    def __init__(
        self,
        model: ExpectedModel,
        tokens: Int32[np.ndarray, "sequence pos"],
        *,
        bos_id: int,
        batch_sequences: int,
        outputs: bool = True,
        n_slots: int = SLOTS,
        threads: int | None = None,
    ) -> None:
        if outputs and model.hookpoint != "mlp":
            raise ConfigError(
                f"inputs alone with hookpoint {model.hookpoint}: they are what is reconstructed",
                found="outputs asked for",
                where="cache.targets",
                fix="set cache.targets=inputs",
            )
        self._model, self._tokens, self._bos_id = model, tokens, bos_id
        self._n_slots, self._threads = n_slots, threads or max(1, torch.get_num_threads() // 2)
        self.n_blocks = -(-len(tokens) // batch_sequences)
        self.codec = model.codec
        neutral = Channels.neutral(model.n_layers, model.d_model)
        self.channels: dict[str, Channels] = dict.fromkeys(("inputs", "outputs") if outputs else ("inputs",), neutral)
        self.sizes: Int[np.ndarray, " block"] = np.array(
            [np.count_nonzero(self.sequences(block) != bos_id) for block in range(self.n_blocks)], dtype=np.int64
        )
        self.strata: Int[np.ndarray, " block"] = np.zeros(self.n_blocks, dtype=np.int64)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._slots: list[Slot] = []
        self._connections: list[Connection] = []
        self._process: BaseProcess | None = None
        self._failure: _Failure | None = None

    def sequences(self, block: int) -> Int32[np.ndarray, "sequence pos"]:
        """Token ids of a block's sequences."""
        return self._tokens[block :: self.n_blocks]

    @property
    def producer_pid(self) -> int | None:
        """Process id of the producer, from entering to closing."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> "LiveBlocks":
        context = multiprocessing.get_context("spawn")
        shape = (len(self.sequences(0)), self._tokens.shape[1])
        ring = Ring(self._n_slots, shape, int(self.sizes.max()), self.codec, tuple(self.channels))
        pairs = [context.Pipe() for _ in range(self._n_slots)]
        theirs = [child for _, child in pairs]
        arguments = (self._model, self._bos_id, ring, theirs, self._threads)
        process = context.Process(target=_produce, args=arguments, daemon=True, name="activations")
        _start_without_signals(process)
        # also if this object is forgotten, and before multiprocessing waits for its children when Python ends
        self._finalizer = Finalize(self, _kill, args=(process,), exitpriority=10)
        ring.close()
        for connection in theirs:
            connection.close()
        self._slots, self._connections = ring.slots, [parent for parent, _ in pairs]
        self._process, self._failure = process, None
        for number in range(self._n_slots):
            self._free.put(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the producer, whatever it is doing, and free the memory; threads that wait for it get an error."""
        if self._process is None:
            return
        process = self._process
        with self._ending:
            self._finalizer()
        # readers give their slots back, because what they wait for has ended
        numbers = [self._free.get() for _ in range(self._n_slots)]
        self._process = None
        process.close()
        for connection in self._connections:
            connection.close()
        self._slots, self._connections = [], []
        for number in numbers:
            self._free.put(number)

    def read(self, block: int) -> dict[tuple[str, str], Shaped[np.ndarray, "token ..."]]:
        """Stored numbers of a block's tokens, computed now; called from several threads, in any order.

        Raises:
            ClientError: the producer has ended.
            CircuitmillError: what the producer met, of its own type: DivergedError if an activation is not finite.
        """
        if self._process is None:
            raise _no_producer("none: it has not been started, or was closed")
        number = self._free.get()
        try:
            if self._process is None:
                raise _no_producer("none: it was closed")
            request = self._prepared(number, block)
            self._ask(self._process, self._connections[number], request)
            return {key: values[: request.tokens].copy() for key, values in self._slots[number].values.items()}
        finally:
            self._free.put(number)

    def _prepared(self, number: int, block: int) -> _Request:
        """A request for a block whose token ids have been put into a slot."""
        sequences = self.sequences(block)
        self._slots[number].tokens[: len(sequences)] = sequences
        return _Request(len(sequences), int(self.sizes[block]))

    def _ask(self, process: BaseProcess, connection: Connection, request: _Request) -> None:
        """Send a request and wait until it is done."""
        answered = False
        try:
            with contextlib.suppress(OSError):  # it has ended; if it could say why, that is received below
                connection.send(request)
            wait([connection, process.sentinel])
            try:
                failure = connection.recv() if connection.poll() else self._end_of(process)
            except (EOFError, OSError):
                failure = self._end_of(process)
            answered = True
        finally:
            if not answered:  # interrupted: the answer would be taken for that of the next request
                with self._ending:
                    _kill(process)
        if failure is not None:
            self._failure = failure
            raise failure.error()

    def _end_of(self, process: BaseProcess) -> _Failure:
        if self._failure is not None:
            return self._failure
        with self._ending:
            process.join(_PATIENCE)
            code = process.exitcode
        if code is None:
            return _Failure.of(_no_producer("one that has closed its pipes"))
        found = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        return _Failure.of(_no_producer(found))


def _no_producer(found: str) -> ClientError:
    return ClientError(
        "a process that runs the language model while the transcoder trains",
        found=found,
        where="cache.mode: stream",
        fix="see its last words above; if memory was short (SIGKILL), lower cache.batch_sequences or train.pool_tokens",
    )


def _start_without_signals(process: BaseProcess) -> None:
    """Start a process in which signals are blocked from its first instruction: it inherits the mask."""
    # would be started on the way otherwise, and unblocks signals when it has been
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _produce(model: ExpectedModel, bos_id: int, ring: Ring, connections: list[Connection], threads: int) -> None:
    """The producer: serves until the pipes close, or says in all of them what went wrong and ends."""
    torch.set_num_threads(threads)
    try:
        _serve(model.load(), bos_id, model.codec, list(zip(connections, ring.slots, strict=True)))
    # what torch, transformers and the system raise; anything else is a mistake and ends the process with a traceback
    except (CircuitmillError, RuntimeError, OSError, MemoryError, ValueError, LookupError) as error:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(_Failure.of(error))


def _serve(sites: Sites, bos_id: int, codec: Codec, pairs: list[tuple[Connection, Slot]]) -> None:
    """Answer requests, in turn if there are several, until the other side is gone."""
    while True:
        ready = wait([connection for connection, _ in pairs])
        for connection, slot in pairs:
            if connection not in ready:
                continue
            try:
                request: _Request = connection.recv()
            except (EOFError, OSError):
                return
            _fill(slot, request, sites, bos_id, codec)
            with contextlib.suppress(OSError):  # gone: the next round notices
                connection.send(None)


def _fill(slot: Slot, request: _Request, sites: Sites, bos_id: int, codec: Codec) -> None:
    """Compute a block and write it into its slot.

    Raises:
        DivergedError: an activation is not finite.
    """
    inputs, outputs = token_activations(sites, slot.tokens[: request.sequences], bos_id)
    neutral = Channels.neutral(sites.n_layers, sites.d_model)
    for (place, name), values in slot.values.items():
        x = inputs if place == "inputs" else outputs
        assert x is not None  # noqa: S101  LiveBlocks asks for outputs of MLPs alone
        stored = codec.encode_block(x, neutral)
        torch.from_numpy(values[: request.tokens]).copy_(stored[name])
