"""Batches of whole sequences, for losses that need the language model: a function of seed and index alone.

An epoch visits every sequence once (but for a last incomplete batch), in an order of its own. A batch of
`batch_tokens` is that many tokens in sequences, BOS included; a rank works on its part of them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.parts import Parts
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError
from circuitmill.training.batches import Pair
from circuitmill.training.objective import Encode
from circuitmill.training.parallel.collectives import Group


@runtime_checkable
class FrozenModel(Protocol):
    """A language model as part of a loss; `lm.end_to_end.EndToEnd` is one."""

    def positions(
        self, tokens: Int[Tensor, "sequence pos"]
    ) -> tuple[Bool[Tensor, "sequence pos"], Bool[Tensor, "sequence pos"]]:
        """Positions that count, and those of them at which a token is predicted."""
        ...

    def original(self, tokens: Int[Tensor, "sequence pos"]) -> Any:
        """What the model does as it is: `x` and `y` in normalised units, BOS excluded, and what `terms` needs."""
        ...

    def terms(
        self, transcoder: Transcoder, encode: Encode, original: Any, names: Collection[str], parts: Parts
    ) -> dict[str, Float[Tensor, ""]]:
        """Means by name, with gradients to the transcoder."""
        ...


@dataclass(frozen=True)
class SequenceBatch:
    """Some sequences of a global batch; the model runs when something of it is first asked for."""

    lm: FrozenModel
    tokens: Int[Tensor, "sequence pos"]
    mean_tokens: float
    """Tokens that count, in an equal share of the global batch."""
    mean_predicted: float
    """Predictions in an equal share."""

    @cached_property
    def _original(self) -> Any:
        return self.lm.original(self.tokens)

    @cached_property
    def _counts(self) -> tuple[int, int]:
        counted, predicted = self.lm.positions(self.tokens)
        return int(counted.sum()), int(predicted.sum())

    @property
    def x(self) -> Float[Tensor, "token layer d_model"]:
        """Normalised inputs, BOS excluded."""
        return self._original.x

    @property
    def y(self) -> Float[Tensor, "token layer d_model"]:
        """Normalised outputs of the same tokens."""
        return self._original.y

    @property
    def share(self) -> float:
        """Tokens here, relative to an equal share."""
        return self._counts[0] / self.mean_tokens

    def terms(
        self, transcoder: Transcoder, encode: Encode, names: Collection[str], parts: Parts
    ) -> dict[str, Float[Tensor, ""]]:
        """End-to-end terms by name, of which the mean over equal shares is the term of the global batch."""
        shares = {"kl": self.share, "cross_entropy": self._counts[1] / self.mean_predicted}
        means = self.lm.terms(transcoder, encode, self._original, names, parts)
        return {name: shares[name] * mean for name, mean in means.items()}

    def parts(self, number: int) -> "Iterator[SequenceBatch]":
        """As many sequences in each of a number of parts; what one made of the model is freed with it.

        Raises:
            ConfigError: the sequences cannot be divided so.
        """
        if len(self.tokens) % number:
            raise ConfigError(
                f"a divisor of the {len(self.tokens)} sequences that a rank has of a batch",
                found=number,
                where="train.optimizer.micro_batches",
                fix="choose a number of parts that have as many whole sequences each",
            )
        if number == 1:
            yield self
            return
        for tokens in self.tokens.chunk(number):
            yield SequenceBatch(self.lm, tokens, self.mean_tokens / number, self.mean_predicted / number)


def parts_of(
    batch: Pair | SequenceBatch, number: int
) -> Iterator[tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"], SequenceBatch | None]]:
    """Equal parts of a batch, one after the other: inputs, outputs, and the sequences if it consists of them.

    Raises:
        ConfigError: it cannot be divided so.
    """
    if isinstance(batch, SequenceBatch):
        for part in batch.parts(number):
            yield part.x, part.y, part
        return
    x, y = batch
    if len(x) % number:
        raise ConfigError(
            f"a divisor of the {len(x)} tokens that a rank has of a batch",
            found=number,
            where="train.optimizer.micro_batches",
            fix="choose a number of parts that have as many tokens each",
        )
    for inputs, outputs in zip(x.chunk(number), y.chunk(number), strict=True):
        yield inputs, outputs, None


class SequenceBatches:
    """Addressed by step, as `training.batches.Batches`.

    Args:
        sequences: Token ids of the train split.
        lm: Reads them.
        cfg: Seed and sizes.
        share: This rank among those that have other sequences of a batch.

    Raises:
        ConfigError: sequences and ranks do not divide a batch, or there are fewer sequences than a batch has.
    """

    def __init__(
        self, sequences: Int[np.ndarray, "sequence pos"], lm: FrozenModel, cfg: TrainConfig, share: Group
    ) -> None:
        self._sequences, self._lm, self._seed = sequences, lm, cfg.seed
        count, context = sequences.shape
        unit = context * share.size
        if cfg.batch_tokens % unit:
            raise ConfigError(
                f"a multiple of {unit} (whole sequences of {context} tokens for each of {share.size} ranks)",
                found=cfg.batch_tokens,
                where="train.batch_tokens",
                fix="round it to such a multiple: end-to-end terms are of whole sequences",
            )
        self._size = cfg.batch_tokens // context
        if count < self._size:
            raise ConfigError(
                f"a batch of at most {count * context} tokens, which is all that is cached",
                found=cfg.batch_tokens,
                where="train.batch_tokens",
                fix="use smaller batches or cache more tokens",
            )
        own = self._size // share.size
        self._rows, self._n_ranks = slice(share.index * own, (share.index + 1) * own), share.size
        self.n_batches_per_epoch = count // self._size
        self._order: tuple[int, Int[np.ndarray, " sequence"]] | None = None

    def __enter__(self) -> "SequenceBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def get(self, index: int) -> SequenceBatch:
        """This rank's sequences of a global batch; epochs follow one another without end."""
        tokens = self._global(index)
        counts = [int(mask.sum()) / self._n_ranks for mask in self._lm.positions(tokens)]
        return SequenceBatch(self._lm, tokens[self._rows], *counts)

    def beginning(self) -> Pair:
        """Inputs and outputs of the whole of the first global batch, for starting values; the same on all ranks."""
        found = [self._lm.original(part) for part in self._global(0).split(self._rows.stop - self._rows.start)]
        return torch.cat([part.x for part in found]), torch.cat([part.y for part in found])

    def _global(self, index: int) -> Int[Tensor, "sequence pos"]:
        epoch, within = divmod(index, self.n_batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._sequences))
        chosen = self._order[1][within * self._size : (within + 1) * self._size]
        return torch.from_numpy(self._sequences[chosen].astype(np.int64))
