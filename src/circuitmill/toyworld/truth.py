"""What is true of the toy world, as `truth.json`: tasks with answers, and circuits with the concepts they pass through.

A circuit is a prompt, an answer and concepts. A concept has a name, words that a feature for it would be explained
by, and `after`: a span of the prompt that occurs once, from whose last token on the concept can be computed and before
which it cannot. That holds by construction of the text. That the model does compute the place of a two-hop question at
that very token is measured (`circuitmill.toyworld.measure`).
"""

import random
from typing import Any

from circuitmill.toyworld import facts
from circuitmill.toyworld.facts import LANGUAGES, OPPOSITES, PLACES
from circuitmill.toyworld.families import (
    HELD_TEMPLATES,
    IOI_TEMPLATES,
    LOCATION_TEMPLATES,
    RELATION_TEMPLATES,
    TRAIN_TEMPLATES,
    article,
    brackets,
)
from circuitmill.toyworld.world import World

FORMAT = 1

BEYOND: dict[str, str] = {
    "addition": "sums of held-out pairs; within the demo's budget the local-first pattern learns few of them",
    "opposites_held": "the direction never stated; no architecture tried generalises to it",
}
"""Tasks that are measured and reported but that truth.json does not hold the model to, and why."""

_SAMPLE = 400
"""Items of the tasks that could have thousands."""
_FRESH = 200
"""Items of the tasks that are drawn afresh."""

Task = dict[str, Any]


def all_tasks(world: World) -> dict[str, Task]:
    """Every task, those of `BEYOND` included."""
    rng = random.Random(f"tasks {world.seed}")
    return {
        **_geography(world, rng),
        **_words(world, rng),
        **_animals(world),
        **_algorithms(world, rng),
    }


def truth(world: World) -> dict[str, Any]:
    """The content of truth.json."""
    return {
        "format": FORMAT,
        "tasks": {name: task for name, task in all_tasks(world).items() if name not in BEYOND},
        "circuits": circuits(world),
    }


def _task(description: str, rule: str, items: list[dict]) -> Task:
    return {"description": description, "rule": rule, "items": items}


def _question(template: str, **values: str) -> str:
    """A template up to the space before its answer."""
    return template.split(" {answer}")[0].format(**values)


def two_hop_question(template: str, city: str, relation: str, world: World) -> dict:
    """One two-hop item, with the place in the middle."""
    place = world.place_of[city]
    prompt = _question(template, city=city, kind=place.kind, relation=relation)
    answer = " " + place.relations[relation]
    return {"prompt": prompt, "answer": answer, "city": city, "relation": relation, "bridge": place.name}


def _geography(world: World, rng: random.Random) -> dict[str, Task]:
    cities = [(city, relation) for place in PLACES for city in place.cities for relation in sorted(place.relations)]
    seen = [pair for pair in cities if pair[0] not in world.held_cities and pair not in world.held_pairs]

    def ask(templates: tuple[str, ...], pairs: list[tuple[str, str]]) -> list[dict]:
        return [two_hop_question(template, *pair, world) for pair in pairs for template in templates]

    location = LOCATION_TEMPLATES[0].split(" {place}")[0]
    relation = RELATION_TEMPLATES[0]
    return {
        "one_hop_location": _task(
            "the place of a city",
            "first_token",
            [
                {"prompt": location.format(kind=place.kind, city=city), "answer": " " + place.name}
                for place in PLACES
                for city in place.cities
            ],
        ),
        "one_hop_relation": _task(
            "a relation of a place",
            "first_token",
            [
                {"prompt": _question(relation, relation=name, place=place.name), "answer": " " + answer}
                for place in PLACES
                for name, answer in place.relations.items()
            ],
        ),
        "two_hop_seen": _task(
            "two hops; city and relation seen together", "first_token", rng.sample(ask(TRAIN_TEMPLATES, seen), _SAMPLE)
        ),
        "two_hop_template": _task(
            "two hops; asked in a way never seen", "first_token", rng.sample(ask(HELD_TEMPLATES, seen), _SAMPLE)
        ),
        "two_hop_pair": _task(
            "two hops; city and relation never seen together",
            "first_token",
            ask(TRAIN_TEMPLATES, sorted(world.held_pairs)),
        ),
        "two_hop_city": _task(
            "two hops; city in no two-hop sentence",
            "first_token",
            ask(TRAIN_TEMPLATES, [pair for pair in cities if pair[0] in world.held_cities]),
        ),
    }


def _words(world: World, rng: random.Random) -> dict[str, Task]:
    seen, held = [], []
    for concept, row in enumerate(OPPOSITES):
        for language, words in enumerate(row):
            for side in range(2):
                prompt = facts.OPPOSITE_TEMPLATES[language].split("{answer}")[0].format(word=words[side])
                items = held if (concept, language, side) in world.held_opposites else seen
                items.append({"prompt": prompt, "answer": words[1 - side]})
    translations = []
    for row in OPPOSITES:
        for side in range(2):
            source, target = rng.sample(range(len(LANGUAGES)), 2)
            prompt = f'The {LANGUAGES[source]} word "{row[source][side]}" in {LANGUAGES[target]} is "'
            translations.append({"prompt": prompt, "answer": row[target][side]})
    return {
        "opposites": _task("the opposite of a word, in four languages", "first_token", seen),
        "opposites_held": _task("the opposite in the direction never stated", "first_token", held),
        "translations": _task("a word in another language", "first_token", translations),
    }


def _animals(world: World) -> dict[str, Task]:
    classes, seen, held = [], [], []
    for animal, kind in world.class_of.items():
        subject = f"{article(animal)} {animal}"
        classes.append({"prompt": f"{subject} is a kind of", "answer": " " + kind.name})
        items = held if animal in world.held_animals else seen
        items.append({"prompt": f"{subject} is covered with", "answer": " " + kind.covering, "bridge": kind.name})
        items.append({"prompt": f"{subject} has", "answer": " " + kind.part, "bridge": kind.name})
    return {
        "animals_class": _task("the class of an animal", "first_token", classes),
        "animals_seen": _task("what is true of an animal because of its class", "first_token", seen),
        "animals_held": _task("the same for animals in no such sentence", "first_token", held),
    }


def _algorithms(world: World, rng: random.Random) -> dict[str, Task]:
    fresh = range(_FRESH)
    sums = [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:02d}"} for a, b in sorted(world.held_sums)]
    return {
        "induction": _task("go on with a list heard before", "first_token", [_induction(rng) for _ in fresh]),
        "ioi": _task("the person not named twice", "first_token", [_ioi(rng) for _ in fresh]),
        "greater_than": _task("a year after the first", "mass_above", [_greater_than(rng) for _ in fresh]),
        "agreement": _task("a verb for the first noun, not the second", "agreement", [_agreement(rng) for _ in fresh]),
        "brackets": _task("the bracket to close", "brackets", [_brackets(world, rng) for _ in fresh]),
        "addition": _task("the sum of a pair never seen", "whole_answer", rng.sample(sums, min(_SAMPLE, len(sums)))),
    }


def _induction(rng: random.Random) -> dict:
    syllables = rng.sample(facts.SYLLABLES, 8)
    repeated = rng.randint(1, 6)
    prompt = "Code: " + " ".join(syllables + syllables[:repeated])
    return {
        "prompt": prompt,
        "answer": " " + syllables[repeated],
        "before": syllables[repeated - 1],
        "next": syllables[repeated],
    }


def _ioi(rng: random.Random) -> dict:
    first, second = rng.sample(facts.PEOPLE, 2)
    giver, taker = (first, second) if rng.random() < 0.5 else (second, first)
    venue, thing = rng.choice(facts.VENUES), rng.choice(facts.OBJECTS)
    template = IOI_TEMPLATES[0].split(" {taker}")[0]
    prompt = template.format(first=first, second=second, venue=venue, giver=giver, thing=thing)
    return {"prompt": prompt, "answer": " " + taker, "giver": giver, "venue": venue}


def _greater_than(rng: random.Random) -> dict:
    century, start = rng.randint(11, 19), rng.randint(5, 90)
    prompt = f"The {rng.choice(facts.EVENTS)} lasted from the year {century}{start:02d} to the year {century}"
    return {"prompt": prompt, "above": start, "century": century}


def _agreement(rng: random.Random) -> dict:
    subject, other = rng.sample(facts.NOUNS, 2)
    number = rng.randrange(2)
    prompt = f"The {subject[number]} {rng.choice(facts.PREPOSITIONS)} the {other[1 - number]}"
    good, bad = ([" " + verb[which].split()[0] for verb in facts.VERBS] for which in (number, 1 - number))
    return {"prompt": prompt, "good": good, "bad": bad, "subject": subject[number], "number": number}


def _brackets(world: World, rng: random.Random) -> dict:
    symbols = brackets(world, rng).split()[1:-1]
    end = rng.choice([index for index, symbol in enumerate(symbols) if index > 1 and symbol in facts.CLOSING])
    foils = [" " + symbol for symbol in facts.CLOSING if symbol != symbols[end]]
    return {"prompt": "Match: " + " ".join(symbols[:end]), "answer": " " + symbols[end], "foils": foils}


# ---------------------------------------------------------------------------------------------------------- circuits

_N_STATES, _N_COUNTRIES, _N_OTHERS = 7, 5, 3


def circuits(world: World) -> dict[str, list[dict]]:
    """Prompts for attribution: fixed by the seed, never chosen by what a model can do.

    Each has `answer`, one right continuation, and `answers`, the first tokens of all right ones.
    """
    rng = random.Random(f"circuits {world.seed}")
    return {
        "two_hop": _two_hop_circuits(world, rng),
        "animals": [_animal_circuit(world, animal) for animal in rng.sample(sorted(world.held_animals), _N_OTHERS)],
        "ioi": [_ioi_circuit(_ioi(rng)) for _ in range(_N_OTHERS)],
        "induction": [_induction_circuit(_induction(rng)) for _ in range(_N_OTHERS)],
        "greater_than": [_greater_than_circuit(_greater_than(rng)) for _ in range(_N_OTHERS)],
        "agreement": [_agreement_circuit(_agreement(rng)) for _ in range(_N_OTHERS)],
    }


def _circuit(prompt: str, answers: list[str], name: str, words: list[str], after: str) -> dict:
    concept = {"name": name, "words": words, "after": after}
    return {"prompt": prompt, "answer": answers[0], "answers": answers, "concepts": [concept]}


def _two_hop_circuits(world: World, rng: random.Random) -> list[dict]:
    # Regions and continents are left out: a few values serve all places, so that the place is not needed.
    held = {"state": [], "country": []}
    for city in sorted(world.held_cities, key=lambda city: (city != "Dallas", city)):
        held[world.place_of[city].kind].append(city)
    states = [held["state"][0], *rng.sample(held["state"][1:], _N_STATES - 1)]
    countries = rng.sample(held["country"], _N_COUNTRIES)
    relations = ["capital"] * _N_STATES + ["capital", "language", "capital", "language", "capital"][:_N_COUNTRIES]
    out = []
    for city, relation in zip(states + countries, relations, strict=True):
        question = two_hop_question(TRAIN_TEMPLATES[0], city, relation, world)
        bridge = question["bridge"]
        out.append(_circuit(question["prompt"], [question["answer"]], bridge, [bridge], city))
    return out


def _animal_circuit(world: World, animal: str) -> dict:
    kind = world.class_of[animal]
    prompt = f"{article(animal)} {animal} is covered with"
    return _circuit(prompt, [" " + kind.covering], kind.name, [kind.name], animal)


def _ioi_circuit(item: dict) -> dict:
    giver = item["giver"]
    span = f"{item['venue']}, {giver}"
    return _circuit(item["prompt"], [item["answer"]], f"{giver} is named twice", [giver], span)


def _induction_circuit(item: dict) -> dict:
    before, following = item["before"], item["next"]
    return _circuit(
        item["prompt"], [item["answer"]], f"{following} follows {before}", [before, following], f"{before} {following}"
    )


def _greater_than_circuit(item: dict) -> dict:
    tens, units = divmod(item["above"], 10)
    right = [str(digit) for digit in range(tens + 1, 10)] + ([str(tens)] if units < 9 else [])
    return _circuit(item["prompt"], right, f"began in {tens}{units}", [str(tens)], f"{item['century']}{tens}{units}")


def _agreement_circuit(item: dict) -> dict:
    name = ("singular", "plural")[item["number"]]
    words = [item["subject"], *(verb.strip() for verb in item["good"])]
    return _circuit(item["prompt"], item["good"], f"{name} subject", words, item["subject"])
