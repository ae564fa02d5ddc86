"""Token-shuffled batches: a function of seed and index alone.

An epoch visits every token once (but for a last incomplete batch):

1. Tokens come in blocks (chunks of a stored shard, sequences of a live model), and every block belongs to a stratum (a
   file of a shard, inside which tokens were shuffled when they were written). Blocks are put in an order in which the
   blocks of each stratum are spread evenly over the epoch, at random places.
2. Consecutive blocks form pools of about `pool_tokens`. So a pool holds its share of every stratum, if it has as many
   blocks as there are strata, and two tokens of a batch are from one document as rarely as in a uniform draw.
3. The tokens of a pool are permuted. The epoch is its pools one after the other, and batch i is tokens
   [i, i + 1) x batch_tokens of that stream. A rank keeps its rows of every batch and no others.

All permutations come from (seed, epoch, pool), so that any batch is found by reading the one or two pools it lies in,
without replaying those before. While a pool is in use, threads read the next one.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int

from circuitmill.core.codecs import Channels, Codec, Encoded, StoredBatch
from circuitmill.errors import ConfigError
from circuitmill.stores.rows import Rows, scatter_rows

_READERS = 2


@runtime_checkable
class Blocks(Protocol):
    """Where pools are read from."""

    codec: Codec
    channels: dict[str, Channels]
    """By place; the places that are stored."""
    sizes: Int[np.ndarray, " block"]
    """Tokens in each block."""
    strata: Int[np.ndarray, " block"]
    """Which stratum each block belongs to, from 0."""

    def read(self, block: int) -> Rows:
        """Stored numbers of a block's tokens; called from several threads.

        Raises:
            StoreError: damaged.
        """
        ...


@dataclass(frozen=True)
class _Plan:
    """One epoch: blocks in order, cut into pools."""

    pools: list[Int[np.ndarray, " _"]]
    ends: Int[np.ndarray, " pool"]
    """Where each pool ends in the epoch's stream of tokens."""


class BatchSource:
    """Batches of stored inputs and, if there are any, outputs. Not to be shared between threads.

    Args:
        blocks: Where tokens are.
        seed: Of all permutations.
        batch_tokens: Tokens in a global batch.
        pool_tokens: About how many tokens are mixed. Two pools are in memory, one in use and the next being read.
        rows: The rows of a global batch that this rank works on; all if None.

    Raises:
        ConfigError: there are fewer tokens than a batch, or the pool is smaller than one.
    """

    def __init__(
        self, blocks: Blocks, *, seed: int, batch_tokens: int, pool_tokens: int, rows: slice | None = None
    ) -> None:
        self._blocks, self._seed, self.batch_tokens = blocks, seed, batch_tokens
        self._first, self._last = (rows or slice(0, batch_tokens)).indices(batch_tokens)[:2]
        self.n_tokens = int(blocks.sizes.sum())
        if self.n_tokens < batch_tokens:
            raise ConfigError(
                f"a batch of at most {self.n_tokens} tokens, which is all that is cached",
                found=str(batch_tokens),
                where="train.batch_tokens",
                fix="use smaller batches or cache more tokens",
            )
        if pool_tokens < batch_tokens:
            raise ConfigError(
                f"a pool of at least one batch ({batch_tokens} tokens)",
                found=str(pool_tokens),
                where="train.pool_tokens",
                fix="raise it: tokens are mixed within a pool",
            )
        self.n_pools = min(max(1, round(self.n_tokens / pool_tokens)), len(blocks.sizes))
        self.n_batches_per_epoch = self.n_tokens // batch_tokens
        self._coordinator = ThreadPoolExecutor(1, thread_name_prefix="pool")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="block-reader")
        self._pools: dict[tuple[int, int], Future[Rows]] = {}
        self._plans: dict[int, _Plan] = {}
        self._spare: list[Rows] = []

    def __enter__(self) -> "BatchSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and free the pools."""
        self._coordinator.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()

    def batch(self, index: int) -> StoredBatch:
        """This rank's rows of one global batch, as they are stored.

        Args:
            index: From 0; epochs follow one another without end.

        Raises:
            StoreError: a chunk is damaged.
        """
        epoch, within = divmod(index, self.n_batches_per_epoch)
        ends = self._plan(epoch).ends
        at, stop = within * self.batch_tokens + self._first, within * self.batch_tokens + self._last
        number = int(np.searchsorted(ends, at, side="right"))
        batch, filled = self._empty(stop - at), 0
        while at < stop:
            high = min(stop, int(ends[number]))
            low_row, high_row = self._rank_rows(epoch, number, at), self._rank_rows(epoch, number, high)
            pool = self._request(epoch, number).result()
            # copied before the next pool is asked for: that one may be read into this one's memory
            for key, value in pool.items():
                batch[key][filled : filled + high - at] = value[low_row:high_row]
            filled += high - at
            at, number = high, number + 1
        self._request(*((epoch, number) if number < self.n_pools else (epoch + 1, 0)))
        return self._assembled(batch)

    def _empty(self, rows: int) -> Rows:
        return {
            (place, name): np.empty((rows, *shape), dtype=dtype)
            for place in self._blocks.channels
            for name, (dtype, shape) in self._blocks.codec.arrays().items()
        }

    def _assembled(self, batch: Rows) -> StoredBatch:
        codec = self._blocks.codec
        encoded = {
            place: Encoded(codec, channels, {name: torch.from_numpy(batch[place, name]) for name in codec.arrays()})
            for place, channels in self._blocks.channels.items()
        }
        return StoredBatch(encoded["inputs"], encoded.get("outputs"))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            order = spread_evenly(self._blocks.strata, self._generator(epoch))
            pools = np.array_split(order, self.n_pools)
            if len(self._plans) > 1:
                self._plans.pop(min(self._plans))
            self._plans[epoch] = _Plan(pools, np.cumsum([int(self._blocks.sizes[part].sum()) for part in pools]))
        return self._plans[epoch]

    def _rank_rows(self, epoch: int, number: int, at: int) -> int:
        """How many of this rank's rows stand in a pool before position `at` of the epoch's stream."""
        ends = self._plan(epoch).ends
        start = int(ends[number - 1]) if number else 0
        return int(self._rows_before(np.array(at)) - self._rows_before(np.array(start)))

    def _rows_before(self, position: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """How many of this rank's rows stand before a position of the stream."""
        batch, offset = np.divmod(position, self.batch_tokens)
        width = self._last - self._first
        return np.asarray(batch * width + np.clip(offset - self._first, 0, width))

    def _request(self, epoch: int, number: int) -> Future[Rows]:
        key = (epoch, number)
        if key not in self._pools:
            # the pool in use and the one being read; a batch that spans two needs both
            while len(self._pools) > 1:
                old = self._pools.pop(next(iter(self._pools)))
                if not old.cancel() and old.done() and old.exception() is None:
                    self._spare.append(old.result())
            self._plan(epoch)
            self._pools[key] = self._coordinator.submit(self._load, epoch, number, self._plans[epoch])
        return self._pools[key]

    def _load(self, epoch: int, number: int, plan: _Plan) -> Rows:
        """Read a pool's blocks and put each row where batches will look for it."""
        blocks = plan.pools[number]
        sizes = self._blocks.sizes[blocks]
        start, size = (int(plan.ends[number - 1]) if number else 0), int(sizes.sum())
        # position in the pool of the pool's tokens, counted block after block
        places = self._generator(epoch, number).permutation(size)
        stream = start + places
        offset = stream % self.batch_tokens
        mine = (offset >= self._first) & (offset < self._last)
        targets = self._rows_before(stream) - self._rows_before(np.array(start))
        stored = self._memory(int(mine.sum()))
        lows = np.cumsum(sizes) - sizes

        def place(block: int, low: int, count: int) -> None:
            rows = slice(low, low + count)
            kept = mine[rows]
            if not kept.any():
                return
            everything, where = bool(kept.all()), targets[rows][kept]
            for key, value in self._blocks.read(block).items():
                scatter_rows(stored[key], where, value[:count] if everything else value[:count][kept])

        for done in [
            self._readers.submit(place, int(block), int(low), int(count))
            for block, low, count in zip(blocks, lows, sizes, strict=True)
        ]:
            done.result()
        return stored

    def _memory(self, rows: int) -> Rows:
        """Room for a pool: that of a pool no longer needed, because fresh memory costs as much time as reading."""
        longest = int(self._blocks.sizes.max())
        spare = self._spare.pop() if self._spare else {}
        stored = {}
        for place in self._blocks.channels:
            for name, (dtype, shape) in self._blocks.codec.arrays().items():
                old = spare.get((place, name))
                # pools differ by a block or two
                fits = old is not None and len(old) >= rows
                stored[place, name] = old if fits else np.empty((rows + 2 * longest, *shape), dtype=dtype)
        return stored


def spread_evenly(strata: Int[np.ndarray, " block"], generator: np.random.Generator) -> Int[np.ndarray, " block"]:
    """An order of blocks in which any run of them holds its share of every stratum.

    The n blocks of a stratum are permuted and stand at (i + u) / n of the way, i = 0 ... n - 1, with one random u per
    stratum (systematic sampling).
    """
    shuffled = generator.permutation(len(strata))
    order = shuffled[np.argsort(strata[shuffled], kind="stable")]
    counts = np.bincount(strata)
    number = np.concatenate([np.arange(count) for count in counts])
    shift = generator.random(len(counts))
    at = (number + np.repeat(shift, counts)) / np.repeat(np.maximum(counts, 1), counts)
    return order[np.argsort(at, kind="stable")]
