"""The circuits of truth.json: prompts whose answer needs a concept known from a certain token on."""

import random

from circuitmill.toyworld.families import TRAIN_TEMPLATES, article
from circuitmill.toyworld.questions import (
    agreement_item,
    greater_than_item,
    induction_item,
    ioi_item,
    two_hop_question,
)
from circuitmill.toyworld.world import World

_N_STATES, _N_COUNTRIES, _N_OTHERS = 7, 5, 3


def circuits(world: World) -> dict[str, list[dict]]:
    """Prompts for attribution: fixed by the seed, never chosen by what a model can do.

    Each has `answer`, one right continuation, and `answers`, the first tokens of all right ones.
    """
    rng = random.Random(f"circuits {world.seed}")
    return {
        "two_hop": _two_hop_circuits(world, rng),
        "animals": [_animal_circuit(world, animal) for animal in rng.sample(sorted(world.held_animals), _N_OTHERS)],
        "ioi": [_ioi_circuit(ioi_item(rng)) for _ in range(_N_OTHERS)],
        "induction": [_induction_circuit(induction_item(rng)) for _ in range(_N_OTHERS)],
        "greater_than": [_greater_than_circuit(greater_than_item(rng)) for _ in range(_N_OTHERS)],
        "agreement": [_agreement_circuit(agreement_item(rng)) for _ in range(_N_OTHERS)],
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
        item["prompt"],
        [item["answer"]],
        f"{following} follows {before}",
        [before, following],
        f"{before} {following}",
    )


def _greater_than_circuit(item: dict) -> dict:
    tens, units = divmod(item["above"], 10)
    right = [str(digit) for digit in range(tens + 1, 10)] + ([str(tens)] if units < 9 else [])
    return _circuit(item["prompt"], right, f"began in {tens}{units}", [str(tens)], f"{item['century']}{tens}{units}")


def _agreement_circuit(item: dict) -> dict:
    name = ("singular", "plural")[item["number"]]
    words = [item["subject"], *(verb.strip() for verb in item["good"])]
    return _circuit(item["prompt"], item["good"], f"{name} subject", words, item["subject"])
