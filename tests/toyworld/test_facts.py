from collections import Counter

from circuitmill.toyworld import facts


def test_every_city_lies_in_one_place_and_is_no_capital():
    names = [city for place in facts.PLACES for city in place.cities]
    names += [place.relations["capital"] for place in facts.PLACES]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_bridges_and_answers_are_one_word():
    for place in facts.PLACES:
        for word in (place.name, *place.relations.values()):
            assert " " not in word, word


def test_opposites_have_four_languages_and_two_words():
    assert len(facts.OPPOSITES) == 20
    assert {len(row) for row in facts.OPPOSITES} == {len(facts.LANGUAGES)}
    for row in facts.OPPOSITES:
        for first, second in row:
            assert first != second


def test_an_animal_belongs_to_one_class():
    members = [member for kind in facts.CLASSES for member in kind.members]
    assert len(members) == len(set(members)) == 60


def test_sixty_places():
    assert Counter(place.kind for place in facts.PLACES) == {"state": 30, "country": 30}
    assert all(len(place.cities) in (3, 4) for place in facts.PLACES)
