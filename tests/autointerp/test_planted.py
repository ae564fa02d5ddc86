"""The explainer recovers causes that were planted, and its score tells them from chance."""

import random

import pytest
from tests.autointerp.planted import BOS, CITIES, Plant, examples, explainer, spell

from circuitmill.autointerp.clients import RuleJudge
from circuitmill.autointerp.rules import Rule
from circuitmill.autointerp.scorers import Score, detection
from circuitmill.autointerp.words import columns_of


def ends_with(texts, at, city):
    pieces = spell(city)
    return list(texts[max(0, at - len(pieces) + 1) : at + 1]) == pieces


def last_piece_of(*cities: str) -> Plant:
    return lambda texts, at: 2.0 if any(ends_with(texts, at, city) for city in cities) else 0.0


def after(*words: str, then: str | None = None, skip: int = 0) -> Plant:
    def plant(texts, at):
        start = at - skip - len(words)
        if start < 0 or [text.strip() for text in texts[start : start + len(words)]] != list(words):
            return 0.0
        return 1.5 if then is None or texts[at].strip() == then else 0.0

    return plant


def explain_and_score(plant: Plant, length: int = 24) -> tuple[str, Score, str | None]:
    material = examples(plant, length=length)
    explanation = explainer().explain(material)
    score = detection(explanation, material.heldout, RuleJudge(), min_windows=5)
    return explanation.text, score, explanation.rule


def fires_in(rule: str, texts: list[str]) -> list[str]:
    columns = columns_of([texts])
    return [text for text, hit in zip(texts, Rule.from_json(rule).fires(columns), strict=True) if hit]


def test_words_in_pieces_come_out_whole():
    text, score, _ = explain_and_score(last_piece_of("Dallas", "Houston", "El Paso"))
    listed = text.removeprefix("fires on ").removesuffix(" (last piece)")
    assert sorted(listed.split(", ")) == ['"Dallas"', '"El Paso"', '"Houston"']
    assert text.endswith("(last piece)")
    assert score.balanced_accuracy >= 0.95


def test_the_word_with_most_activation_is_named_first():
    def plant(texts, at):
        return max(last_piece_of("Reno", "Dallas")(texts, at), 20 * last_piece_of("Denver")(texts, at))

    assert explain_and_score(plant)[0].startswith('fires on "Denver", ')


def test_context_is_named_where_the_token_is_not_enough():
    text, score, rule = explain_and_score(after("capital", then="of"))
    assert text == 'fires on "of" after "capital"'
    assert fires_in(rule, [BOS, "The", " state", " of", " a", " capital", " of"]) == [" of"]
    assert score.balanced_accuracy >= 0.95


def test_context_is_left_out_where_the_token_is_enough():
    assert explain_and_score(lambda texts, at: float(texts[at] == " of"))[0] == 'fires on "of"'


def test_the_word_after_two_others():
    text, score, rule = explain_and_score(after("capital", "of"))
    assert text == 'fires on the word after "capital of"'
    assert fires_in(rule, [BOS, "The", " capital", " of", " Rome", " and", " of", " Bonn"]) == [" Rome"]
    assert score.balanced_accuracy >= 0.95


def test_the_second_word_after_two_others():
    text, score, rule = explain_and_score(after("capital", "of", skip=1))
    assert text == 'fires on the second word after "capital of"'
    assert fires_in(rule, [BOS, "The", " capital", " of", " Rome", " has"]) == [" has"]
    assert score.balanced_accuracy >= 0.95


def test_kinds_of_token():
    text, score, rule = explain_and_score(lambda texts, at: float(texts[at].strip().isdigit()))
    assert text == "fires on numbers"
    assert fires_in(rule, [" in", " 1", "7", "3", "2", ","]) == [" 1", "7", "3", "2"]
    assert score.balanced_accuracy >= 0.95


def test_a_digit_by_its_place():
    def third_digit(texts, at):
        return float(
            at > 2 and all(text.strip().isdigit() for text in texts[at - 2 : at + 1]) and texts[at - 2][0] == " "
        )

    text, score, _ = explain_and_score(third_digit)
    assert text == "fires on the third piece of numbers"
    assert score.balanced_accuracy >= 0.95


def test_words_that_come_again():
    def again(texts, at):
        start = max(place for place in range(at + 1) if place == 0 or texts[place] == BOS)
        return float(texts[at] == " Anna" and " Anna" in texts[start:at])

    text, score, _ = explain_and_score(again)
    assert "Anna" in text
    assert score.balanced_accuracy >= 0.95


def test_the_first_word_of_a_text():
    # Short windows, or a text would begin in every one of them.
    text, score, _ = explain_and_score(lambda texts, at: float(at > 0 and texts[at - 1] == BOS), length=7)
    assert text == "fires on the word after the start of a text"
    assert score.balanced_accuracy >= 0.95


def test_two_causes_are_both_found():
    text, score, _ = explain_and_score(lambda texts, at: float(texts[at].strip().isdigit() or texts[at] == " robin"))
    assert text in ('fires on numbers; also on "robin"', 'fires on "robin"; also on numbers')
    assert score.balanced_accuracy >= 0.95


@pytest.mark.parametrize("seed", range(5))
def test_a_random_feature_scores_about_chance(seed):
    rng = random.Random(seed)
    # Once in a window and a half, wherever.
    _, score, _ = explain_and_score(lambda texts, at: float(rng.random() < 0.03))
    assert score.balanced_accuracy is not None and score.balanced_accuracy <= 0.65


def test_long_lists_are_cut():
    text, score, _ = explain_and_score(last_piece_of(*CITIES[:8]))
    assert text.count('"') == 12 and "+2 more" in text
    assert score.balanced_accuracy >= 0.95


def test_the_order_of_the_windows_does_not_matter():
    material = examples(last_piece_of("Dallas", "Reno", "Tampa"))
    turned = type(material)(**(vars(material) | {"train": material.train[::-1]}))
    again = explainer().explain(material)
    assert explainer().explain(material) == again
    assert set(explainer().explain(turned).words) == set(again.words)
