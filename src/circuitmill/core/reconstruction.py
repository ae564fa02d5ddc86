"""What features write, added up: over sources, over Matryoshka prefixes and over shards of features."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitmill.core.encoding import wide
from circuitmill.core.operand import Operand
from circuitmill.core.parts import Parts
from circuitmill.core.transcoder import Transcoder


class Reconstruction:
    """Takes in one source after the other.

    Every stretch of features is decoded once and added to those before it; biases and the skip connection are in every
    prefix. Sums over shards are sent in one piece at the end or, if `parts` overlaps, by layer as soon as all sources
    that write to the layer are in.

    Args:
        transcoder: Its features are those of this shard.
        x: What it reads.
        spans: Stretches between Matryoshka prefixes, of the features of all shards.
        parts: Where the other shards are.
    """

    def __init__(
        self, transcoder: Transcoder, x: Float[Tensor, "token layer d_model"], spans: Sequence[slice], parts: Parts
    ) -> None:
        self._coder, self._x, self._parts = transcoder, x, parts
        self._spans = [parts.within(span) for span in spans]
        self._written: list[list[Tensor]] = []
        """By source, by prefix: what its features up to there write, [token target d_model]."""
        self._by_target: list[list[tuple[Tensor, ...]]] = []
        """The same by target, if sums are sent by layer."""
        self._arriving: dict[int, Callable[[], Tensor]] = {}

    def write(self, source: int, a: Operand) -> None:
        """The next source's activations."""
        found: list[Tensor] = []
        for span in self._spans:
            now = self._stretch(source, a, span)
            found.append(now if not found else found[-1] + now)
        if not self._parts.overlap:
            self._written.append(found)
            return
        # the gradients of all targets are put together once; by index each would be put among zeros
        self._by_target.append([written.unbind(1) for written in found])
        for layer in self._completed(source):
            self._arriving[layer] = self._parts.begin(torch.stack(self._layer(layer), dim=1))

    def _stretch(self, source: int, a: Operand, span: slice) -> Float[Tensor, "token target d_model"]:
        targets = self._coder.topology.writes[source]
        if span.start is not None and span.start == span.stop:
            return self._x.new_zeros((len(self._x), len(targets), self._coder.d_model))
        return wide(self._coder.decoder.written(source, a.within(span), self._x[:, source], span))

    def _completed(self, source: int) -> list[int]:
        """Layers that no later source writes to."""
        topology = self._coder.topology
        return [layer for layer in topology.writes[source] if topology.writers(layer)[-1][0] == source]

    def _layer(self, layer: int) -> list[Float[Tensor, "token d_model"]]:
        """What the shard writes to a layer, by prefix."""
        writers = self._coder.topology.writers(layer)
        found = []
        for prefix in range(len(self._spans)):
            first, *others = (self._by_target[source][prefix][index] for source, index in writers)
            found.append(sum(others, start=first))
        return found

    def finish(self) -> list[Float[Tensor, "token layer d_model"]]:
        """The reconstruction by each prefix."""
        if self._arriving:
            whole = torch.stack([self._arriving[layer]() for layer in range(self._coder.n_layers)], dim=1)
        else:
            prefixes = range(len(self._spans))
            partial = [self._coder.collected([written[prefix] for written in self._written]) for prefix in prefixes]
            if len(partial) == 1:
                return [self._coder.with_biases(self._parts.total(partial[0]), self._x)]
            # sent in one piece
            whole = self._parts.total(torch.stack(partial, dim=2))
        return [self._coder.with_biases(one, self._x) for one in whole.unbind(2)]
