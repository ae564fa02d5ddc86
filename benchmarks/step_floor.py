"""The least that a training step can cost: its operations and bytes, and the rates of this machine.

floor = dense products at the rate of products + the larger of sparse products at that rate and the tables that they
read, once, at the rate of memory + what norm and update move at that rate.

The rate of memory is that of changing numbers in place, as an update does. A copy moves fewer bytes in the same time,
because a processor reads what is overwritten.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MOVED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes that are read and written to measure the rate; more than any cache holds."""


@dataclass(frozen=True)
class Shape:
    """Of a training; features are per layer."""

    n_layers: int
    d_model: int
    n_features: int
    batch_tokens: int

    @property
    def widths(self) -> list[int]:
        """Numbers that a feature writes, by source."""
        return [(self.n_layers - source) * self.d_model for source in range(self.n_layers)]


SHAPES = {
    "S": Shape(4, 128, 1024, 1024),
    "M": Shape(6, 256, 4096, 1024),
    "G": Shape(12, 768, 32_768, 4096),
    "X": Shape(16, 2048, 32_768, 2048),
}


class Clock:
    """Seconds by name: of the processor, or of a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts for the name."""
        start = self._mark()
        yield
        self._marks[name].append((start, self._mark()))

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Of all phases since it was last asked."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        found = {name: sum(_between(*pair) for pair in pairs) for name, pairs in self._marks.items()}
        self._marks.clear()
        return found


def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(stop) / 1000  # type: ignore[arg-type]
    return stop - start  # type: ignore[operator]


class Yardstick:
    """The matrix products of the dense way with nothing besides, and memory that is read and written."""

    def __init__(self, sizes: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self._sizes, products = sizes, {"device": device, "dtype": dtype}
        features, tokens, widest = self._sizes.n_features, self._sizes.batch_tokens, max(self._sizes.widths)
        self._a, self._found = (torch.randn(tokens, features, **products) for _ in range(2))
        self._rows, self._written = (torch.randn(tokens * widest, **products) for _ in range(2))
        self._weight, self._gradient = (torch.randn(features * widest, **products) for _ in range(2))
        self._moved = torch.ones(MOVED[device.type] // 4, device=device)

    @staticmethod
    def size(sizes: Shape, device: torch.device, dtype: torch.dtype) -> int:
        """Bytes of what it works on."""
        tables = max(sizes.widths) * (sizes.n_features + sizes.batch_tokens) + sizes.batch_tokens * sizes.n_features
        return 2 * dtype.itemsize * tables + MOVED[device.type]

    @torch.no_grad()
    def measure(self, clock: Clock) -> None:
        """Once each."""
        with clock.phase("products"):
            for width in self._sizes.widths:
                self._layer(self._sizes.d_model, by_activation=False)
                self._layer(width, by_activation=True)
        with clock.phase("memory"):
            self._moved.neg_()

    def _layer(self, width: int, *, by_activation: bool) -> None:
        tokens, features = self._a.shape
        rows, written = (each[: tokens * width].view(tokens, width) for each in (self._rows, self._written))
        weight, gradient = (each[: features * width].view(features, width) for each in (self._weight, self._gradient))
        if by_activation:
            torch.mm(self._a, weight, out=written)
        torch.mm(rows, weight.T, out=self._found)
        torch.mm(self._a.T, rows, out=gradient)


def dense_flop(sizes: Shape) -> int:
    """Of encoders, forward and by weight, and of decoders, forward, by activation and by weight."""
    return 2 * sizes.batch_tokens * sizes.n_features * sum(2 * sizes.d_model + 3 * width for width in sizes.widths)


def sparse_flop(sizes: Shape, entries: Sequence[int]) -> tuple[int, int]:
    """Of the dense product that finds places, and of all others, at these numbers of places by source.

    At a place these are its pre-activation, once more, and its gradient by the encoder; what it writes, and the
    gradients by activation and decoder.
    """
    finding = 2 * sizes.batch_tokens * sizes.n_features * sizes.d_model * sizes.n_layers
    pairs = zip(entries, sizes.widths, strict=True)
    return finding, sum(2 * count * (2 * sizes.d_model + 3 * width) for count, width in pairs)


def table_bytes(sizes: Shape, entries: Sequence[int], weight_bytes: int) -> int:
    """Of the rows that sparse products cannot do without: weights of places, or all if these are fewer, twice."""
    rows = [min(count, sizes.n_features) for count in entries]
    return sum(2 * weight_bytes * row * (sizes.d_model + width) for row, width in zip(rows, sizes.widths, strict=True))


def update_bytes(sizes: Shape, weight_bytes: int, moment_bytes: int, touched: float = 1.0) -> float:
    """Gradients are written and read twice, for the norm and for the update; weights and moments are read and written.

    Args:
        sizes: Encoders and decoders; what else is trained are few numbers.
        weight_bytes: Of a weight, and of its gradient.
        moment_bytes: Of each of two moments.
        touched: Share of the weights that an update moves.
    """
    numbers = sizes.n_features * sum(sizes.d_model + width for width in sizes.widths)
    return numbers * (3 * weight_bytes + touched * (2 * weight_bytes + 4 * moment_bytes))


def rates(sizes: Shape, device: torch.device, yardstick: dict[str, float]) -> tuple[float, float]:
    """Operations and bytes per second, from the seconds of the yardstick."""
    return dense_flop(sizes) / yardstick["products"], 2 * MOVED[device.type] / yardstick["memory"]


def floor(sizes: Shape, device: torch.device, work: dict[str, float], yardstick: dict[str, float]) -> float:
    """Seconds that the work takes at the rates of the yardstick, whose seconds these are."""
    flop_rate, byte_rate = rates(sizes, device, yardstick)
    few = max(work.get("sparse_flop", 0) / flop_rate, work.get("table_bytes", 0) / byte_rate)
    return work["dense_flop"] / flop_rate + few + work["update_bytes"] / byte_rate


@dataclass(frozen=True)
class Round:
    """Seconds of one step of a way, of the yardstick beside it, and of the floor that follows."""

    phases: dict[str, float]
    yardstick: dict[str, float]
    floor: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.phases[name] for name in ("forward", "backward", "norm_clip", "update"))
