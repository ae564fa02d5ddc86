import json

import pytest

from circuitmill.toyworld import facts
from circuitmill.toyworld.questions import BEYOND, all_tasks
from circuitmill.toyworld.tasks import RULES
from circuitmill.toyworld.truth import truth
from circuitmill.toyworld.world import World, make_world


@pytest.fixture(scope="module")
def told(world: World) -> dict:
    return truth(world)


def test_tasks_are_those_the_model_is_held_to(told: dict, world: World):
    assert set(told["tasks"]) == set(all_tasks(world)) - set(BEYOND)
    for task in told["tasks"].values():
        assert task["rule"] in RULES and task["items"] and task["description"]


def test_it_is_plain_json_and_a_function_of_the_seed(told: dict, world: World):
    assert json.loads(json.dumps(told)) == told == truth(make_world(world.seed))
    assert truth(make_world(world.seed + 1)) != told


def test_two_hop_circuits_ask_about_held_out_cities(told: dict, world: World):
    circuits = told["circuits"]["two_hop"]
    assert len(circuits) >= 10
    assert circuits[0] == {
        "prompt": "The capital of the state containing Dallas is",
        "answer": " Austin",
        "answers": [" Austin"],
        "concepts": [{"name": "Texas", "words": ["Texas"], "after": "Dallas"}],
    }
    places = {place.name: place for place in facts.PLACES}
    seen = set()
    for circuit in circuits:
        (concept,) = circuit["concepts"]
        place = places[concept["name"]]
        assert concept["after"] in world.held_cities & set(place.cities)
        assert circuit["answer"].strip() in place.relations.values()
        assert concept["name"] not in circuit["prompt"]
        seen.add(concept["name"])
    assert len(seen) == len(circuits), "every circuit has a bridge of its own"


def test_other_circuits(told: dict, world: World):
    circuits = told["circuits"]
    assert set(circuits) == {"two_hop", "animals", "ioi", "induction", "greater_than", "agreement"}
    for name, group in circuits.items():
        assert len(group) >= 3, name
        for circuit in group:
            assert circuit["answer"] == circuit["answers"][0]
            for concept in circuit["concepts"]:
                assert circuit["prompt"].count(concept["after"]) == 1, circuit
                assert concept["name"] and concept["words"]
    for circuit in circuits["animals"]:
        assert circuit["concepts"][0]["after"] in world.held_animals


def test_greater_than_answers_allow_a_later_year(told: dict):
    for circuit in told["circuits"]["greater_than"]:
        year = circuit["prompt"].split()[6]
        start = int(year[2:])
        for digit in range(10):
            later = any(10 * digit + units > start for units in range(10))
            assert (str(digit) in circuit["answers"]) == later, (circuit, digit)
