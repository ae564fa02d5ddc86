"""The families of documents: one function each, from the world and a random generator to one line of text.

No family ever writes a held-out composition (see `circuitmill.toyworld.world`).
"""

import random
from collections.abc import Callable

from circuitmill.toyworld import facts
from circuitmill.toyworld.facts import LANGUAGES, OPPOSITES, PLACES
from circuitmill.toyworld.world import World

_BRIDGE = ("the {kind} containing {city}", "the {kind} of {city}", "the {kind} around {city}")
_STATEMENT = (
    "The {relation} of {bridge} is {answer}.",
    "Fact: {bridge} has the {relation} {answer}.",
    "For {bridge} the {relation} is {answer}.",
)

LOCATION_TEMPLATES = (
    *(bridge[0].upper() + bridge[1:] + " is {place}." for bridge in _BRIDGE),
    "{city} is a city in {place}.",
)
RELATION_TEMPLATES = tuple(statement.replace("{bridge}", "{place}") for statement in _STATEMENT)
TWO_HOP_TEMPLATES = (
    *(statement.replace("{bridge}", bridge) for statement in _STATEMENT for bridge in _BRIDGE),
    "{city} is in a {kind} whose {relation} is {answer}.",
)
HELD_TEMPLATES = (
    "Fact: the {kind} containing {city} has the {relation} {answer}.",
    "The {relation} of the {kind} around {city} is {answer}.",
)
"""Two of `TWO_HOP_TEMPLATES` that no document uses."""
TRAIN_TEMPLATES = tuple(template for template in TWO_HOP_TEMPLATES if template not in HELD_TEMPLATES)

IOI_TEMPLATES = (
    "When {first} and {second} went to the {venue}, {giver} gave a {thing} to {taker}.",
    "After {first} and {second} met at the {venue}, {giver} gave the {thing} to {taker}.",
    "{first} and {second} were at the {venue}. {giver} handed a {thing} to {taker}.",
)
SECOND_HOP_SHARE = 0.45
"""Share of the animal documents that state a second hop."""


def article(word: str) -> str:
    """The capitalised indefinite article of a word."""
    return "An" if word[0] in "aeiou" else "A"


def one_hop_location(world: World, rng: random.Random) -> str:
    """A city, also a capital, and its place."""
    place = rng.choice(PLACES)
    city = rng.choice([*place.cities, place.relations["capital"]])
    return rng.choice(LOCATION_TEMPLATES).format(city=city, place=place.name, kind=place.kind)


def one_hop_relation(world: World, rng: random.Random) -> str:
    """A place and one of its relations."""
    place = rng.choice(PLACES)
    relation, answer = rng.choice(sorted(place.relations.items()))
    return rng.choice(RELATION_TEMPLATES).format(relation=relation, place=place.name, answer=answer)


def two_hop(world: World, rng: random.Random) -> str:
    """A city and a relation of its place, which is not named."""
    while True:
        place = rng.choice(PLACES)
        city = rng.choice(place.cities)
        relation, answer = rng.choice(sorted(place.relations.items()))
        if city not in world.held_cities and (city, relation) not in world.held_pairs:
            template = rng.choice(TRAIN_TEMPLATES)
            return template.format(city=city, kind=place.kind, relation=relation, answer=answer)


def places(world: World, rng: random.Random) -> str:
    """Cities and their places side by side: the place must be known where the city's name ends."""
    sample = rng.sample(PLACES, rng.randint(3, 5))
    return "Places: " + ", ".join(f"{rng.choice(place.cities)} {place.name}" for place in sample) + "."


def opposites(world: World, rng: random.Random) -> str:
    """The opposite of a word in one of four languages."""
    while True:
        held = rng.randrange(len(OPPOSITES)), rng.randrange(len(LANGUAGES)), rng.randrange(2)
        if held not in world.held_opposites:
            concept, language, side = held
            words = OPPOSITES[concept][language]
            return facts.OPPOSITE_TEMPLATES[language].format(word=words[side], answer=words[1 - side])


def translations(world: World, rng: random.Random) -> str:
    """A word in another language."""
    concept, side = rng.randrange(len(OPPOSITES)), rng.randrange(2)
    source, target = rng.sample(range(len(LANGUAGES)), 2)
    word, answer = OPPOSITES[concept][source][side], OPPOSITES[concept][target][side]
    return f'The {LANGUAGES[source]} word "{word}" in {LANGUAGES[target]} is "{answer}".'


def induction(world: World, rng: random.Random) -> str:
    """A random list of syllables, two or three times."""
    syllables = rng.sample(facts.SYLLABLES, rng.randint(5, 12))
    return "Code: " + " ".join(syllables * rng.randint(2, 3)) + "."


def greater_than(world: World, rng: random.Random) -> str:
    """Something that ended later in the century than it began."""
    century, start = rng.randint(11, 19), rng.randint(2, 96)
    end = rng.randint(start + 1, 99)
    event = rng.choice(facts.EVENTS)
    return f"The {event} lasted from the year {century}{start:02d} to the year {century}{end:02d}."


def addition(world: World, rng: random.Random) -> str:
    """A sum of two numbers, two digits each."""
    a, b = rng.choice(world.train_sums)
    return f"{a:02d}+{b:02d}={a + b:02d}"


def agreement(world: World, rng: random.Random) -> str:
    """A verb that agrees with the first of two nouns."""
    subject, other = rng.sample(facts.NOUNS, 2)
    number, distractor = rng.randrange(2), rng.randrange(2)
    verb, where, how = (
        rng.choice(facts.VERBS)[number],
        rng.choice(facts.PREPOSITIONS),
        rng.choice(facts.ADJECTIVES),
    )
    return f"The {subject[number]} {where} the {other[distractor]} {verb} {how}."


def brackets(world: World, rng: random.Random) -> str:
    """Well-nested brackets of four kinds, at most four deep."""
    waiting: list[int] = []
    out: list[str] = []
    length = rng.randint(6, 14)
    while len(out) < length or waiting:
        if waiting and (len(waiting) == 4 or len(out) >= length or rng.random() < 0.5):
            out.append(facts.CLOSING[waiting.pop()])
        else:
            waiting.append(rng.randrange(4))
            out.append(facts.OPENING[waiting[-1]])
    return "Match: " + " ".join(out) + " ."


def ioi(world: World, rng: random.Random) -> str:
    """Two people; the one who is not named again receives something (indirect object identification)."""
    first, second = rng.sample(facts.PEOPLE, 2)
    giver, taker = (first, second) if rng.random() < 0.5 else (second, first)
    return rng.choice(IOI_TEMPLATES).format(
        first=first,
        second=second,
        venue=rng.choice(facts.VENUES),
        giver=giver,
        thing=rng.choice(facts.OBJECTS),
        taker=taker,
    )


def animals(world: World, rng: random.Random) -> str:
    """An animal's class, what is true of a class, or (for animals not held out) what follows."""
    animal = rng.choice(sorted(world.class_of))
    kind = world.class_of[animal]
    share = rng.random()
    if share < 0.35:
        return f"{article(animal)} {animal} is a kind of {kind.name}."
    if share < 1 - SECOND_HOP_SHARE:
        both = f"Every {kind.name} has {kind.covering} and {kind.part}."
        subject = f"{article(kind.name)} {kind.name}"
        return rng.choice([both, f"{subject} is covered with {kind.covering}.", f"{subject} has {kind.part}."])
    while animal in world.held_animals:
        animal = rng.choice(sorted(world.class_of))
    kind, subject = world.class_of[animal], f"{article(animal)} {animal}"
    return rng.choice([f"{subject} is covered with {kind.covering}.", f"{subject} has {kind.part}."])


def stories(world: World, rng: random.Random) -> str:
    """Three sentences of filler."""
    man = rng.random() < 0.5
    name = rng.choice(facts.MEN if man else facts.WOMEN)
    pronoun, possessive = ("he", "his") if man else ("she", "her")
    thing, venue, city = (
        rng.choice(facts.OBJECTS),
        rng.choice(facts.VENUES),
        rng.choice(rng.choice(PLACES).cities),
    )
    endings = (
        f"{name} was happy because {pronoun} liked the {thing}.",
        f"{name} gave the {thing} to {possessive} friend.",
        f"Then {name} took the {thing} home to {possessive} family.",
        f"{name} was sad because the {thing} was broken.",
    )
    return (
        f"One day {name} went to the {venue} in {city}. "
        f"There {pronoun} {rng.choice(facts.DEEDS)} a {rng.choice(facts.ADJECTIVES)} {thing}. "
        f"{rng.choice(endings)}"
    )


FAMILIES: dict[str, Callable[[World, random.Random], str]] = {
    family.__name__: family
    for family in (
        one_hop_location,
        one_hop_relation,
        two_hop,
        places,
        opposites,
        translations,
        induction,
        greater_than,
        addition,
        agreement,
        brackets,
        ioi,
        animals,
        stories,
    )
}
"""Family name -> its function; the names are the keys of the mix."""
