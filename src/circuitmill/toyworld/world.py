"""The toy world of one seed: the facts, and which compositions no training document may state.

Held out are, all drawn from the seed:

| what | how much | still in the training text |
|---|---|---|
| cities | one per place (Dallas for Texas) in no two-hop sentence | their state or country, stories |
| pairs | a relation of every fourth other city | the city with its other relations |
| templates | two of ten ways to ask a two-hop question | the other eight |
| sums | a tenth of all two-digit pairs | the other pairs |
| opposites | one direction of every concept in one language | the other direction, the other languages |
| animals | two per class in no second-hop sentence | their class |
"""

import random
from dataclasses import dataclass
from functools import cached_property

from circuitmill.toyworld.facts import CLASSES, LANGUAGES, OPPOSITES, PLACES, AnimalClass, Place

PAIR_SHARE = 0.25
"""Chance that a city which is not held out itself has one held-out relation."""
SUM_SHARE = 0.1
"""Share of the two-digit pairs that are held out."""
FIRST_CITY = "Dallas"
"""Always held out, so that the best-known two-hop question is a test and not a memory."""


@dataclass(frozen=True)
class World:
    """Facts and held-out sets; a function of the seed."""

    seed: int
    held_cities: frozenset[str]
    held_pairs: frozenset[tuple[str, str]]
    """(city, relation)."""
    held_sums: frozenset[tuple[int, int]]
    held_opposites: frozenset[tuple[int, int, int]]
    """(concept, language, which of its two words is asked about)."""
    held_animals: frozenset[str]

    @cached_property
    def place_of(self) -> dict[str, Place]:
        """City -> its place."""
        return {city: place for place in PLACES for city in place.cities}

    @cached_property
    def class_of(self) -> dict[str, AnimalClass]:
        """Animal -> its class."""
        return {member: kind for kind in CLASSES for member in kind.members}

    @cached_property
    def train_sums(self) -> tuple[tuple[int, int], ...]:
        """The pairs that training documents add up."""
        return tuple(pair for pair in all_sums() if pair not in self.held_sums)


def all_sums() -> list[tuple[int, int]]:
    """Every pair of numbers whose sum has at most two digits."""
    return [(a, b) for a in range(100) for b in range(100 - a)]


def make_world(seed: int) -> World:
    """Draw the held-out sets."""
    rng = random.Random(f"world {seed}")
    held_cities = {FIRST_CITY if FIRST_CITY in place.cities else rng.choice(place.cities) for place in PLACES}
    held_pairs = {
        (city, rng.choice(sorted(place.relations)))
        for place in PLACES
        for city in place.cities
        if city not in held_cities and rng.random() < PAIR_SHARE
    }
    sums = all_sums()
    return World(
        seed=seed,
        held_cities=frozenset(held_cities),
        held_pairs=frozenset(held_pairs),
        held_sums=frozenset(rng.sample(sums, round(SUM_SHARE * len(sums)))),
        held_opposites=frozenset(
            (concept, rng.randrange(len(LANGUAGES)), rng.randrange(2)) for concept in range(len(OPPOSITES))
        ),
        held_animals=frozenset(member for kind in CLASSES for member in rng.sample(kind.members, 2)),
    )
