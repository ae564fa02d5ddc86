"""The text: documents of all families, mixed by share, and their split by hash."""

import hashlib
import random

from circuitmill.toyworld.families import FAMILIES
from circuitmill.toyworld.world import World


def write_documents(world: World, mix: dict[str, float], n_documents: int) -> list[str]:
    """Draw documents; a function of the world's seed, the mix and the number.

    Args:
        mix: Family name -> share of the documents; relative, need not add up to 1.
    """
    rng = random.Random(f"documents {world.seed}")
    names = rng.choices(list(mix), list(mix.values()), k=n_documents)
    return [FAMILIES[name](world, rng) for name in names]


def split_documents(documents: list[str], heldout_share: float) -> tuple[list[str], list[str]]:
    """Split into train and held-out by a hash of the text, so that equal documents are on the same side.

    Args:
        heldout_share: Expected share of distinct documents on the held-out side.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < heldout_share * 2**64].append(document)
    return sides
