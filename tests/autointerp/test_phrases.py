import numpy as np
import pytest

from circuitmill.autointerp.phrases import describe, full_name
from circuitmill.autointerp.rules import Clause, Rule
from circuitmill.autointerp.search import Evidence, Found
from circuitmill.autointerp.words import columns_of

BOS = "<|endoftext|>"
TEXT = [BOS, "The", " capital", " of", " El", " Pa", "so", " is", " 1", "7", ",", " El", " Pa", "so", "."]


def say(*clauses: Clause, covers: float = 1.0, limit: int = 6, texts: list[str] = TEXT) -> str:
    columns = columns_of([texts])
    rule = Rule(clauses)
    evidence = Evidence(columns, rule.fires(columns).astype(float))
    return describe(Found(rule, 1.0, covers), evidence, limit)


@pytest.mark.parametrize(
    ("columns", "keys", "text"),
    [
        (("prefix",), [("Paso",)], '"El Paso" (last piece)'),
        (("prefix",), [("Pa",)], '"El Paso" (first piece)'),
        (("word",), [("Paso",)], '"El Paso"'),
        (("token",), [(" Pa",)], '" Pa"'),
        (("kind",), [("number",), ("punctuation",)], "numbers, punctuation"),
        (("kind", "piece"), [("number", "last")], "the last piece of numbers"),
        (("kind", "nth"), [("number", "2")], "the second piece of numbers"),
        (("back1",), [("of",)], 'the word after "of"'),
        (("back1",), [("",)], "the word after the start of a text"),
        (("back1", "piece"), [("El", "last")], 'the last piece of the word after "El"'),
        (("back2",), [("of",)], 'the second word after "of"'),
        (("back3",), [("of",)], 'the third word after "of"'),
        (("place",), [("1",)], "the first word of a text"),
        (("again",), [("repeated",)], "repeated words"),
        (("again", "prefix"), [("repeated", "Paso")], 'repeated "El Paso" (last piece)'),
        (("back1", "kind"), [("is", "number")], 'numbers after "is"'),
        (("back1", "prefix"), [("capital", "of")], '"of" after "capital"'),
        (("back2", "prefix"), [("capital", "El")], '"El" two words after "capital"'),
        (("back1", "prefix"), [("capital", "of"), ("El", "Paso")], '"of" after "capital", "El Paso" after "El"'),
        (("back2", "back1"), [("capital", "of")], 'the word after "capital of"'),
        (("back2", "back1"), [("", "The")], 'the word after an opening "The"'),
        (("back3", "back2"), [("capital", "of")], 'the second word after "capital of"'),
    ],
)
def test_every_family_has_its_words(columns, keys, text):
    said = say(Clause(columns, tuple(keys)))
    if columns == ("back1", "prefix") and len(keys) > 1:
        assert sorted(said.removesuffix(" (last piece)").split(", ")) == sorted(text.split(", "))
    else:
        assert said == text


def test_clauses_are_joined_and_coverage_is_said_if_low():
    clauses = (Clause(("prefix",), (("of",),)), Clause(("kind",), (("number",),)))
    assert say(*clauses) == '"of"; also on numbers'
    assert say(*clauses, covers=0.55) == '"of"; also on numbers (covers 55% of its activation)'


def test_one_place_for_many_words():
    clause = Clause(("back1", "prefix"), (("of", "El"), ("capital", "of"), ("", "The")))
    said = say(clause, limit=2)
    assert said.endswith("+1 more") and said.count(" after ") == 2


def test_the_beginning_of_several_words_is_shown_as_such():
    texts = [BOS, " Da", "ll", "as", " Da", "ya", " or", " Da", "ll", "as"]
    assert say(Clause(("prefix",), (("Da",),)), texts=texts) == '"Da…" (first piece)'


def test_names_of_several_words():
    columns = columns_of([[BOS, " New", " York", " and", " New", " York", " or", " York", "shire", " in", " Ohio"]])
    assert full_name(columns, "York") == "New York"
    # Once is no evidence, and small words are no part of a name.
    assert full_name(columns, "Ohio") == "Ohio"
    assert full_name(columns, "and") == "and"


def test_longer_lists_of_words_are_ordered_by_weight():
    columns = columns_of([[BOS, " a", " b", " c"]])
    rule = Rule((Clause(("prefix",), (("a",), ("b",), ("c",))),))
    evidence = Evidence(columns, np.array([0.0, 1.0, 3.0, 2.0]))
    assert describe(Found(rule, 1.0, 1.0), evidence, 2) == '"b", "c", +1 more'
