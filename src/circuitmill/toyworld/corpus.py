"""The text: documents of all families, mixed by share."""

import random
from collections.abc import Collection

from circuitmill.errors import ConfigError
from circuitmill.toyworld.families import FAMILIES
from circuitmill.toyworld.world import World

_PATIENCE = 1000
"""Draws in a row that may hit excluded documents."""


def write_documents(
    world: World, mix: dict[str, float], n_documents: int, *, stream: str, exclude: Collection[str] = ()
) -> list[str]:
    """Draw documents; a function of the world's seed, the mix and the stream's name.

    Args:
        mix: Family name -> share of the documents; relative, need not add up to 1.
        stream: Names an independent sequence of draws ("train", "heldout").
        exclude: Documents that must not be drawn; a draw that hits one is repeated.

    Raises:
        ConfigError: the families of the mix have next to nothing left to say.
    """
    rng = random.Random(f"{stream} {world.seed}")
    names, shares = list(mix), list(mix.values())
    documents: list[str] = []
    missed = 0
    while len(documents) < n_documents:
        (name,) = rng.choices(names, shares)
        document = FAMILIES[name](world, rng)
        if document not in exclude:
            documents.append(document)
            missed = 0
        elif (missed := missed + 1) == _PATIENCE:
            raise ConfigError(
                f"a mix with {n_documents} documents to draw for {stream}",
                found=f"{len(documents)}, and {_PATIENCE} repeats of training documents in a row",
                where="toyworld.corpus.mix",
                fix="add a family with fresh samples, such as stories or induction",
            )
    return documents
