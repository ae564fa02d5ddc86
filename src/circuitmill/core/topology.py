"""Which source reads which layers, and which (source, target) pairs have decoder blocks.

A layer stands for a place in a model at which activations are taken: the MLP of a block, a point of the residual
stream, or, over several models, such a point of one of them. A source is a group of features that share what they read.

| topology | source s reads | and writes |
|---|---|---|
| clt | layer s | layers s, s + 1, ... ("Circuit Tracing", Ameisen et al. 2025) |
| plt, sae, molt | layer s | layer s |
| acausal | layer s | all layers |
| crosscoder | all layers (one source) | all layers ("Sparse Crosscoders", Lindsey et al. 2024) |
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Reads and writes of every source, as layer numbers, ascending."""

    n_layers: int
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]

    @property
    def n_sources(self) -> int:
        """Groups of features."""
        return len(self.reads)

    @property
    def reads_one(self) -> bool:
        """Whether source s reads layer s and nothing else."""
        return self.reads == tuple((layer,) for layer in range(self.n_layers))

    def encoders(self, source: int) -> range:
        """Rows of W_enc that belong to a source, one for each layer it reads."""
        first = sum(len(reads) for reads in self.reads[:source])
        return range(first, first + len(self.reads[source]))

    def pairs(self, source: int) -> range:
        """Numbers of a source's (source, target) pairs, sources first."""
        first = sum(len(writes) for writes in self.writes[:source])
        return range(first, first + len(self.writes[source]))

    def writers(self, layer: int) -> tuple[tuple[int, int], ...]:
        """Who writes to a layer: each source, and which of its targets the layer is.

        >>> make_topology("clt", 3).writers(1)
        ((0, 1), (1, 0))
        """
        return tuple((source, writes.index(layer)) for source, writes in enumerate(self.writes) if layer in writes)

    @property
    def n_pairs(self) -> int:
        """Decoder blocks."""
        return sum(len(writes) for writes in self.writes)


def make_topology(name: str, n_layers: int) -> Topology:
    """The topology of this name over so many layers.

    >>> make_topology("clt", 3).writes
    ((0, 1, 2), (1, 2), (2,))
    >>> make_topology("crosscoder", 2).reads
    ((0, 1),)
    """
    layers = tuple(range(n_layers))
    own = tuple((layer,) for layer in layers)
    table = {
        "clt": (own, tuple(layers[layer:] for layer in layers)),
        "plt": (own, own),
        "sae": (own, own),
        "molt": (own, own),
        "acausal": (own, (layers,) * n_layers),
        "crosscoder": ((layers,), (layers,)),
    }
    return Topology(n_layers, *table[name])
