"""Token-shuffled batches: a function of seed and index alone.

An epoch visits every token once (but for a last incomplete batch):

1. The tokens of all shards are cut into blocks, one chunk each; the blocks are permuted.
2. Consecutive blocks form pools of about `pool_tokens`; a pool is read into memory as it is stored (int8 stays int8).
3. The tokens of a pool are permuted. The epoch is its pools one after the other, and batch i is tokens
   [i, i + 1) x batch_tokens of that stream, in the order in which they lie in memory.

All permutations come from (seed, epoch, pool), so that any batch is found by reading the one or two pools it lies in,
without replaying those before. While a pool is in use, a thread reads the next one.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.errors import ConfigError
from circuitmill.stores.activation_schema import PLACES
from circuitmill.stores.activation_shard import ActivationShard, Stored


@dataclass(frozen=True)
class _Pool:
    """Blocks in memory, as stored; `shard` says whose channel scales hold for a token."""

    stored: dict[str, Stored]
    shard: Int[Tensor, " token"]


class BatchSource:
    """Batches of MLP inputs and outputs. Not to be shared between threads.

    Args:
        shards: In a fixed order.
        seed: Of all permutations.
        batch_tokens: Tokens in a batch.
        pool_tokens: About how many tokens are mixed, and held in memory twice (one pool in use, the next being read).

    Raises:
        ConfigError: there are fewer tokens than a batch, or the pool is smaller than one.
    """

    def __init__(self, shards: list[ActivationShard], *, seed: int, batch_tokens: int, pool_tokens: int) -> None:
        self._shards, self._seed, self.batch_tokens = shards, seed, batch_tokens
        self.n_tokens = sum(shard.n_tokens for shard in shards)
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
        self._blocks = np.array(
            [
                (index, start, min(start + shard.chunk, shard.n_tokens))
                for index, shard in enumerate(shards)
                for start in range(0, shard.n_tokens, shard.chunk)
            ]
        )
        self.n_pools = min(max(1, round(self.n_tokens / pool_tokens)), len(self._blocks))
        self.n_batches_per_epoch = self.n_tokens // batch_tokens
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="pool-reader")
        self._pools: dict[tuple[int, ...], Future[_Pool]] = {}
        self._plans: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._orders: dict[tuple[int, int], Int[Tensor, " token"]] = {}

    def __enter__(self) -> "BatchSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and free the pools."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()

    def batch(self, index: int) -> tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]:
        """MLP inputs and outputs of one batch, in float32.

        Args:
            index: From 0; epochs follow one another without end.

        Raises:
            StoreError: a chunk is damaged.
        """
        epoch, within = divmod(index, self.n_batches_per_epoch)
        _, ends = self._plan(epoch)
        start, stop = within * self.batch_tokens, (within + 1) * self.batch_tokens
        codec = self._shards[0].codec
        shape = (self.batch_tokens, codec.n_layers, codec.d_model)
        x = {place: torch.empty(shape, dtype=torch.float32) for place in PLACES}
        number, at = int(np.searchsorted(ends, start, side="right")), 0
        while start < stop:
            low = int(ends[number - 1]) if number else 0
            high = min(stop, int(ends[number]))
            part = {place: value[at : at + high - start] for place, value in x.items()}
            self._rows(part, epoch, number, start - low, high - low)
            at, start, number = at + high - start, high, number + 1
        self._read_ahead(epoch, number - 1)
        return x["inputs"], x["outputs"]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Blocks of each pool, and where each pool ends in the epoch's stream of tokens."""
        if epoch not in self._plans:
            order = self._generator(epoch).permutation(len(self._blocks))
            pools = [np.sort(part) for part in np.array_split(order, self.n_pools)]
            sizes = [int((self._blocks[part, 2] - self._blocks[part, 1]).sum()) for part in pools]
            if len(self._plans) > 1:
                self._plans.clear()
            self._plans[epoch] = pools, np.cumsum(sizes)
        return self._plans[epoch]

    def _order(self, epoch: int, number: int, size: int) -> Int[Tensor, " token"]:
        key = (epoch, number)
        if key not in self._orders:
            if len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = torch.from_numpy(self._generator(epoch, number).permutation(size))
        return self._orders[key]

    def _request(self, epoch: int, number: int) -> Future[_Pool]:
        blocks = tuple(self._plan(epoch)[0][number].tolist())
        if blocks not in self._pools:
            # the pool in use and the one being read; a batch that spans two needs both
            while len(self._pools) > 1:
                self._pools.pop(next(iter(self._pools))).cancel()
            self._pools[blocks] = self._executor.submit(self._load, blocks)
        return self._pools[blocks]

    def _read_ahead(self, epoch: int, number: int) -> None:
        self._request(*((epoch, number + 1) if number + 1 < self.n_pools else (epoch + 1, 0)))

    def _load(self, blocks: tuple[int, ...]) -> _Pool:
        """Read blocks straight into one tensor per array, so that no second copy exists."""
        chosen = self._blocks[list(blocks)]
        size = int((chosen[:, 2] - chosen[:, 1]).sum())
        stored: dict[str, Stored] = {place: {} for place in PLACES}
        owner = torch.empty(size, dtype=torch.int64)
        at = 0
        for index, start, stop in chosen.tolist():
            rows = slice(at, at + stop - start)
            owner[rows] = index
            for place in PLACES:
                for name, value in self._shards[index].stored(place, start, stop).items():
                    if name not in stored[place]:
                        stored[place][name] = torch.empty((size, *value.shape[1:]), dtype=value.dtype)
                    stored[place][name][rows] = value
            at = rows.stop
        return _Pool(stored, owner)

    def _rows(self, x: dict[str, Tensor], epoch: int, number: int, low: int, high: int) -> None:
        """Fill tensors with tokens [low, high) of a pool."""
        pool = self._request(epoch, number).result()
        # which tokens a batch holds is random, their order in it is not: sorted, those of a shard are neighbours
        chosen = self._order(epoch, number, len(pool.shard))[low:high].sort().values
        codec = self._shards[0].codec
        for at in range(0, len(chosen), codec.block_rows):
            rows = chosen[at : at + codec.block_rows]
            owners, counts = torch.unique_consecutive(pool.shard[rows], return_counts=True)
            for place in PLACES:
                block = x[place][at : at + len(rows)]
                # index_select copies whole rows and is seven times faster than value[rows]
                stored = {name: value.index_select(0, rows) for name, value in pool.stored[place].items()}
                codec.decode_into(block, stored, None)
                for owner, part in zip(owners.tolist(), block.split(counts.tolist()), strict=True):
                    channel = self._shards[owner].channel(place)
                    if channel is not None:
                        part.mul_(channel)
