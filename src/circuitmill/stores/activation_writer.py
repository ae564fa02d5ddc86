"""Writing one shard of activations, beside the model's forward pass and resumable at every file.

The number of tokens is known before the model runs (positions that are not BOS), so all arrays have their final shape
from the start. `append` hands activations to a thread that takes moments, encodes, and puts every row where the file's
shuffled order wants it. When a file's worth of tokens is there, every array's file is written and made durable, and the
ledger records it with the checksums of its chunks. A kill loses at most one file's worth of work, and the result is the
same bytes as an unbroken run's.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from circuitmill.core.codecs import Channels, Codec, standardised
from circuitmill.errors import ShapeError
from circuitmill.stores.activation_schema import CHUNKS, GROUP, PROVENANCE, ArraySpec, Layout, array_specs, create_group
from circuitmill.stores.chunk_files import split_chunks, write_chunks
from circuitmill.stores.files import atomic_write, canonical_json
from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.normalization import (
    MomentSums,
    load_moments,
    merge_moments,
    save_moments,
)
from circuitmill.stores.rows import scatter_rows

_ERROR_SAMPLE = 8
"""The error of the codec is measured on every eighth block of tokens."""
_WAITING = 2
"""Batches that wait for the thread before `append` waits for it."""
_MEASURED = ("inputs", "outputs")


@dataclass(frozen=True)
class _Handed:
    """A batch on its way to the thread."""

    inputs: Float[Tensor, "token layer d_model"]
    outputs: Float[Tensor, "token layer d_model"]
    ready: torch.cuda.Event | None
    """On a GPU: when the batch has been computed."""

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """On a GPU, work beside the model's stream, after the batch is there."""
        if self.ready is None:
            yield
            return
        stream = _streams.setdefault(self.inputs.device, torch.cuda.Stream(self.inputs.device))
        stream.wait_event(self.ready)
        for tensor in (self.inputs, self.outputs):
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield


_streams: dict[torch.device, torch.cuda.Stream] = {}


class ShardWriter:
    """Takes activations in corpus order and leaves `activations.zarr`, `chunks.json` and `moments.safetensors`.

    Use as a context manager: leaving it stops the thread, whatever happened.

    Args:
        out: The shard's output; its ledger says which files are done.
        codec: How numbers are stored.
        layout: How rows lie in chunks and files.
        channels: The codec's constants of inputs and outputs.
        places: What is stored: inputs and outputs, or inputs alone. Moments are taken of both.
        provenance: Sequence, position and token id of every token of the shard, in corpus order.
        attributes: Where the numbers come from; stored with the group.
        seed: Of the order of rows.
    """

    def __init__(
        self,
        out: StageOutput,
        codec: Codec,
        layout: Layout,
        *,
        channels: dict[str, Channels],
        places: tuple[str, ...],
        provenance: dict[str, Int[np.ndarray, " token"]],
        attributes: dict,
        seed: int,
    ) -> None:
        self._out, self._codec, self._layout, self._seed = out, codec, layout, seed
        self._channels, self._places, self._provenance = channels, places, provenance
        self._specs = array_specs(codec, layout, places)
        self._path = out.path(GROUP)
        self._partial = out.path("partial")
        self._attributes = attributes
        self._done = 0
        while self._done < layout.n_files and out.ledger.get(_key(self._done)) is not None:
            self._done += 1
        self._taken = self.rows_done
        self._window = _Window(self._done, layout, seed, self._specs, places) if self._done < layout.n_files else None
        self._queue: queue.Queue[_Handed | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="shard-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop(drop=kind is not None)

    @property
    def rows_done(self) -> int:
        """Tokens that are written and durable: where to go on."""
        return min(self._done * self._layout.file_rows, self._layout.n_rows)

    def append(
        self, inputs: Float[Tensor, "token layer d_model"], outputs: Float[Tensor, "token layer d_model"]
    ) -> None:
        """Add the next tokens, following `rows_done` and what was appended since.

        Returns at once unless the thread is behind; the tensors must not be changed afterwards.

        Raises:
            DivergedError: an activation of an earlier call is not finite.
            ShapeError: more tokens than the shard has.
        """
        self._taken += len(inputs)
        if self._taken > self._layout.n_rows:
            raise ShapeError(
                f"{self._layout.n_rows} tokens in the shard",
                found=f"{self._taken}",
                where=self._path,
                fix="append the activations of this shard's tokens only",
            )
        ready = torch.cuda.Event() if inputs.is_cuda else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(inputs.device))
        self._put(_Handed(inputs, outputs, ready))

    def _put(self, item: "_Handed") -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _stop(self, *, drop: bool) -> None:
        if drop:
            self._drain()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _drain(self) -> None:
        # the other thread may take the last batch between a look and a get
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _work(self) -> None:
        """The thread."""
        try:
            self._create()
            while (handed := self._queue.get()) is not None:
                with handed.on_own_stream():
                    self._take(handed.inputs, handed.outputs)
        except BaseException as error:  # noqa: BLE001  handed to the caller of append or finish
            self._error = error
            self._drain()

    def _create(self) -> None:
        """Make the group: several durable files, for which the first batch need not wait."""
        if self._out.ledger.get("created") is None:
            constants = {place: self._channels[place] for place in self._places}
            create_group(self._path, self._codec, self._layout, constants, self._attributes)
            self._out.ledger.put("created")

    def _take(self, inputs: Tensor, outputs: Tensor) -> None:
        at = 0
        while at < len(inputs):
            window = self._window
            assert window is not None  # noqa: S101  append counts rows
            count = min(window.room, len(inputs) - at)
            window.add(
                self._codec, self._channels, {"inputs": inputs[at : at + count], "outputs": outputs[at : at + count]}
            )
            at += count
            if not window.room:
                self._flush(window)

    def _flush(self, window: "_Window") -> None:
        moments = [window.sums[place].moments(place.removesuffix("s")) for place in _MEASURED]
        for name, values in self._provenance.items():
            start, stop = self._layout.span(self._done)
            window.arrays[name][: stop - start] = values[start:stop][window.order].astype(PROVENANCE[name])
        chunks = {}
        for spec in self._specs:
            entries = write_chunks(
                self._path / spec.file(self._done),
                list(split_chunks(window.arrays[spec.name][: window.size], spec.chunk)),
                spec.chunks_per_file,
                level=spec.level,
                repetitions=spec.repetitions,
            )
            chunks[spec.name] = [list(asdict(entry).values()) for entry in entries]
        save_moments(self._partial / f"{_key(self._done)}.safetensors", *moments)
        self._out.ledger.put(_key(self._done), chunks=chunks, **window.errors)
        self._done += 1
        self._window = window.next(self._done) if self._done < self._layout.n_files else None

    def finish(self) -> dict:
        """Wait for the thread, merge the moments of all files and give the counts for the manifest.

        Raises:
            DivergedError: an activation is not finite.
            ShapeError: tokens are missing.
        """
        self._stop(drop=False)
        if self._error is not None:
            raise self._error
        if self._done < self._layout.n_files:
            raise ShapeError(
                f"{self._layout.n_rows} tokens",
                found=f"{self._taken}",
                where=self._path,
                fix="append all of the shard's tokens before finishing",
            )
        entries = [self._out.ledger.get(_key(index)) or {} for index in range(self._layout.n_files)]
        self._merge()
        noted = {spec.name: [entry["chunks"][spec.name] for entry in entries] for spec in self._specs}
        atomic_write(self._out.path(CHUNKS), canonical_json(noted) + "\n")
        counts: dict = {"tokens": self._layout.n_rows}
        for place in self._places:
            for key in ("error", "energy"):
                counts[f"{place}_{key}"] = np.sum([entry[f"{place}_{key}"] for entry in entries], axis=0).tolist()
        for path in self._partial.glob("*.safetensors"):
            path.unlink()
        if self._partial.is_dir():
            self._partial.rmdir()
        return counts

    def _merge(self) -> None:
        # a run killed between the two steps of finish() has merged, and removed some of the parts
        if self._out.ledger.get("merged") is None:
            paths = [self._partial / f"{_key(index)}.safetensors" for index in range(self._layout.n_files)]
            save_moments(self._out.path("moments.safetensors"), *merge_moments(load_moments(path) for path in paths))
            self._out.ledger.put("merged")


class _Window:
    """The tokens of one file on their way: every row already where the shuffled order wants it."""

    def __init__(
        self,
        file: int,
        layout: Layout,
        seed: int,
        specs: Sequence[ArraySpec],
        places: tuple[str, ...],
        arrays: dict[str, Shaped[np.ndarray, "token ..."]] | None = None,
    ) -> None:
        self._layout, self._seed, self._specs, self._places = layout, seed, specs, places
        start, stop = layout.span(file)
        self.size = stop - start
        self.order = layout.order(file, seed)
        self._row_of = np.argsort(self.order)
        longest = min(layout.file_rows, layout.n_rows)
        self.arrays = arrays or {spec.name: np.zeros((longest, *spec.shape), dtype=spec.dtype) for spec in specs}
        self.sums: dict[str, MomentSums] = {}
        self.errors: dict[str, list[float]] = {}
        self._filled = self._blocks = 0
        self._spare: Tensor | None = None

    def next(self, file: int) -> "_Window":
        """The window of another file, in the same memory."""
        return _Window(file, self._layout, self._seed, self._specs, self._places, self.arrays)

    @property
    def room(self) -> int:
        """Tokens that are missing."""
        return self.size - self._filled

    def add(self, codec: Codec, channels: dict[str, Channels], values: dict[str, Tensor]) -> None:
        """Encode the next tokens and put them in their rows; on a CPU in blocks that stay in its cache."""
        inputs = values["inputs"]
        rows = len(inputs) if inputs.is_cuda else codec.block_rows
        for low in range(0, len(inputs), rows):
            for place, x in values.items():
                self._add_block(codec, channels[place], place, x[low : low + rows])
            self._filled += min(rows, len(inputs) - low)
            self._blocks += 1

    def _add_block(self, codec: Codec, channels: Channels, place: str, x: Float[Tensor, "token layer d_model"]) -> None:
        constants = channels.to(x.device)
        u, spare = self._memory(x)
        standardised(x, constants, out=u)
        if place not in self.sums:
            self.sums[place] = MomentSums(channels)
        self.sums[place].add(u, spare)
        if place not in self._places:
            return
        stored = codec.encode_block(x, constants) if codec.exact else codec.encode_standardised(u, constants)
        if self._blocks % _ERROR_SAMPLE == 0:
            self._note_error(place, codec.decode(stored, constants), x)
        where = self._row_of[self._filled : self._filled + len(x)]
        for name, value in stored.items():
            scatter_rows(self.arrays[f"{place}/{name}"], where, value.contiguous().cpu().numpy())

    def _memory(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "2 token layer d_model"]:
        """Memory for a block's numbers on the way, the same for all blocks: it stays in the processor's cache."""
        known = self._spare
        if known is None or known.device != x.device or known.shape[1] < len(x):
            known = self._spare = torch.empty(2, *x.shape, dtype=torch.float32, device=x.device)
        return known[:, : len(x)]

    def _note_error(self, place: str, restored: Tensor, x: Tensor) -> None:
        # contiguous, because sums depend in the last place on how numbers lie in memory
        exact = x.to(torch.float32).contiguous()
        for key, value in (("error", (restored - exact)), ("energy", exact)):
            total = value.square().sum(dim=(0, 2), dtype=torch.float64).cpu().numpy()
            known = self.errors.get(f"{place}_{key}", np.zeros(len(total)))
            self.errors[f"{place}_{key}"] = (np.asarray(known) + total).tolist()


def _key(index: int) -> str:
    return f"file-{index:05d}"


def nmse(counts: Sequence[dict], place: str) -> list[float] | None:
    """Mean squared error of the codec per layer, relative to the mean square, over shards; None if not stored.

    Args:
        counts: What `ShardWriter.finish` gave, one per shard.
        place: "inputs" or "outputs".
    """
    if f"{place}_error" not in counts[0]:
        return None
    error = np.sum([entry[f"{place}_error"] for entry in counts], axis=0)
    energy = np.sum([entry[f"{place}_energy"] for entry in counts], axis=0)
    return (error / np.maximum(energy, np.finfo(np.float64).tiny)).tolist()
