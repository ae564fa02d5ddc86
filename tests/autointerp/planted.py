"""Windows of a small language with features planted in them, whose causes are therefore known."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from circuitmill.autointerp.examples import Examples, Logit, Window
from circuitmill.autointerp.explain import TokenExplainer
from circuitmill.autointerp.search import SearchOptions

BOS = "<|endoftext|>"
CITIES = ("Dallas", "Houston", "El Paso", "Denver", "Boise", "Tampa", "Austin", "Memphis", "Topeka", "Reno")
STATES = ("Texas", "Utah", "Ohio", "Idaho", "Maine", "Iowa", "Kansas", "Oregon")

Plant = Callable[[Sequence[str], int], float]
"""Tokens of a window and a position -> activation."""


@lru_cache
def spell(city: str) -> list[str]:
    """A city name in tokens of two characters, as the embedded model's tokenizer cuts it."""
    return [(" " if at == 0 else "") + word[at : at + 2] for word in city.split() for at in range(0, len(word), 2)]


TEMPLATES = [
    ["The", "capital", "of", "STATE", "is", "CITY", "."],
    ["The", "state", "of", "CITY", "is", "STATE", "."],
    ["The", "code", "of", "STATE", "is", "TX", "."],
    ["A", "robin", "is", "a", "kind", "of", "bird", "."],
    ["The", "war", "lasted", "from", "the", "year", "NUMBER", "."],
    ["The", "capital", "of", "the", "state", "containing", "CITY", "is", "Salem", "."],
    ["One", "day", "Anna", "went", "to", "CITY", ",", "where", "Anna", "sat", "."],
    ["Boris", "and", "Carla", "met", "where", "Anna", "met", "Boris", "."],
    ["The", "capital", "city", "is", "CITY", "and", "not", "CITY", "."],
    ["In", "that", "year", "the", "old", "robin", "has", "NUMBER", "A", "birds", "."],
]


def sentence(rng: random.Random) -> list[str]:
    """One text in tokens."""
    texts: list[str] = []
    for word in rng.choice(TEMPLATES):
        if word == "CITY":
            texts += spell(rng.choice(CITIES))
        elif word == "NUMBER":
            texts += [f" {rng.randrange(1, 10)}", *(str(rng.randrange(10)) for _ in range(3))]
        elif word == "STATE":
            texts.append(f" {rng.choice(STATES)}")
        else:
            texts.append(f" {word}" if texts and word not in ".," else word)
    return texts


def window(rng: random.Random, plant: Plant, length: int) -> Window:
    """Some texts from the start of one on, or from somewhere in it."""
    texts: list[str] = []
    start = rng.choice([0, 1, rng.randrange(6)])
    while len(texts) < start + length:
        texts += [BOS, *sentence(rng)]
    texts = texts[start : start + length]
    values = [0.0 if text == BOS else plant(texts, at) for at, text in enumerate(texts)]
    return Window(tuple(texts), np.array(values, dtype=np.float32))


def windows(plant: Plant, seed: int, length: int = 24, firing: int = 30, silent: int = 20) -> tuple[Window, ...]:
    rng = random.Random(seed)
    found: dict[bool, list[Window]] = {True: [], False: []}
    wanted = {True: firing, False: silent}
    for _ in range(5000):
        candidate = window(rng, plant, length)
        if len(found[candidate.fires]) < wanted[candidate.fires]:
            found[candidate.fires].append(candidate)
    if any(len(found[fires]) < wanted[fires] for fires in wanted):
        raise ValueError(f"too rare or too frequent: {[len(kind) for kind in found.values()]}")
    return (*found[True], *found[False])


def examples(
    plant: Plant,
    top: Sequence[tuple[str, float]] = (),
    bottom: Sequence[tuple[str, float]] = (),
    length: int = 24,
) -> Examples:
    return Examples(
        layer=1,
        feature=7,
        n_active=400,
        train=windows(plant, seed=1, length=length),
        heldout=windows(plant, seed=2, length=length),
        top_logits=tuple(Logit(*entry) for entry in top),
        bottom_logits=tuple(Logit(*entry) for entry in bottom),
    )


def explainer(**changes: object) -> TokenExplainer:
    options = {
        "search": SearchOptions(cost=1.0, max_clauses=3, min_gain=0.02),
        "n_tokens": 120_000,
        "min_windows": 5,
        "max_listed": 6,
        "max_words": 20,
        "max_promoted": 5,
        "min_separation": 3.0,
    }
    return TokenExplainer(**(options | changes))
