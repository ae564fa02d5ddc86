"""The held-out compositions are searched for in the demo's whole training text, whatever wrote it."""

import re
from collections import defaultdict

import pytest

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.toyworld import facts
from circuitmill.toyworld.corpus import split_documents, write_documents
from circuitmill.toyworld.families import FAMILIES, HELD_TEMPLATES
from circuitmill.toyworld.questions import all_tasks
from circuitmill.toyworld.world import World, make_world


def words_of(document: str) -> set[str]:
    return set(re.findall(r"\w+", document))


@pytest.fixture(scope="module")
def by_city(documents: list[str]) -> dict[str, list[set[str]]]:
    """City -> the words of each document that names it."""
    cities = sorted((city for place in facts.PLACES for city in place.cities), key=len, reverse=True)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, cities)) + r")\b")
    found = defaultdict(list)
    for document in set(documents):
        for city in set(pattern.findall(document)):
            found[city].append(words_of(document))
    return found


def test_held_out_cities_never_meet_an_answer(world: World, by_city: dict):
    assert len(world.held_cities) == len(facts.PLACES) and "Dallas" in world.held_cities
    for city in world.held_cities:
        answers = set(world.place_of[city].relations.values())
        assert by_city[city], f"{city} must still be in the text"
        assert not any(answers & words for words in by_city[city]), city


def test_held_out_pairs_never_meet(world: World, by_city: dict):
    assert len(world.held_pairs) > 20
    for city, relation in world.held_pairs:
        assert not any(world.place_of[city].relations[relation] in words for words in by_city[city])


def test_other_cities_do_meet_their_answers(world: World, by_city: dict):
    """The search above can find something."""
    for place in facts.PLACES:
        for city in set(place.cities) - world.held_cities:
            for relation, answer in place.relations.items():
                met = any(answer in words for words in by_city[city])
                assert met != ((city, relation) in world.held_pairs), (city, relation)


def test_held_out_templates_are_never_used(documents: list[str]):
    city = r"[A-Z][A-Za-z ]+"
    patterns = [
        re.compile(re.sub(r"\\{(\w+)\\}", lambda hole: city if hole[1] == "city" else r"\w+", re.escape(template)))
        for template in HELD_TEMPLATES
    ]
    example = "The capital of the state around Dallas is Austin."
    assert any(pattern.fullmatch(example) for pattern in patterns)
    assert not any(pattern.search(document) for document in documents for pattern in patterns)


def test_held_out_sums_never_occur(world: World, documents: list[str]):
    stated = {document.split("=")[0] for document in documents if "=" in document}
    assert len(world.held_sums) == 505 and len(stated) > 3000
    assert not stated & {f"{a:02d}+{b:02d}" for a, b in world.held_sums}


def test_held_out_opposites_never_occur(world: World, documents: list[str]):
    text = set(documents)
    assert len(world.held_opposites) == len(facts.OPPOSITES)
    for concept, language, side in world.held_opposites:
        words = facts.OPPOSITES[concept][language]
        template = facts.OPPOSITE_TEMPLATES[language]
        assert template.format(word=words[side], answer=words[1 - side]) not in text
        assert template.format(word=words[1 - side], answer=words[side]) in text


def test_held_out_animals_never_meet_their_properties(world: World, documents: list[str]):
    assert len(world.held_animals) == 2 * len(facts.CLASSES)
    kinds = set()
    for document in documents:
        words = words_of(document)
        for animal in words & world.held_animals:
            kind = world.class_of[animal]
            assert not words & {kind.covering, kind.part}, document
            kinds |= {animal} & {animal if kind.name in words else ""}
    assert kinds == world.held_animals, "their class must be in the text"


@pytest.mark.parametrize("task", ["two_hop_city", "two_hop_pair", "animals_held", "opposites_held"])
def test_no_training_document_answers_a_held_out_question(task: str, world: World, documents: list[str]):
    text = "\n".join(set(documents))
    for item in all_tasks(world)[task]["items"]:
        assert item["prompt"] + item["answer"] not in text


def test_the_split_is_by_text_and_keeps_every_family(documents: list[str], heldout: list[str]):
    train, again = split_documents(documents, 0.033)
    assert again == heldout and len(train) + len(heldout) == len(documents)
    assert not set(train) & set(heldout)
    assert len(set(heldout)) / len(set(documents)) == pytest.approx(0.033, abs=0.003)
    assert len(heldout) / len(documents) == pytest.approx(0.033, abs=0.01)
    for start in ("Places:", "Code:", "Match:", "When ", "One day ", "Fact: ", "For the ", "Das Gegenteil"):
        assert any(document.startswith(start) for document in heldout), start


def test_the_seed_decides_the_text(tiny_cfg: ToyworldConfig):
    def draw(seed: int) -> list[str]:
        return write_documents(make_world(seed), tiny_cfg.corpus.mix, 300)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert make_world(3) == make_world(3) != make_world(4)


def test_every_family_writes_one_line(world: World):
    for name in FAMILIES:
        (document,) = write_documents(world, {name: 1.0}, 1)
        assert document and "\n" not in document
