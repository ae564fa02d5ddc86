import numpy as np
import pytest
from tests.autointerp.planted import examples, explainer

from circuitmill.autointerp.examples import Examples, Logit, Window
from circuitmill.autointerp.explain import Explainer, evidence_of, promoted

NOISE = [0.31, 0.3, 0.3, 0.29, 0.29, 0.28, 0.28, 0.28, 0.27, 0.27]


def logits(values, sign=1):
    return tuple(Logit(f" t{number}", sign * value) for number, value in enumerate(values))


def names(top, bottom=NOISE, limit=5):
    return promoted(logits(top), logits(bottom, -1), 3.0, limit)


def test_tokens_that_stand_out_are_promoted():
    assert names([1.2, 0.8, *NOISE[2:]]) == (" t0", " t1")


def test_nothing_is_promoted_where_nothing_stands_out():
    assert names(NOISE) == ()


def test_a_whole_list_can_stand_out():
    assert names(np.linspace(3.0, 2.0, 10)) == (" t0", " t1", " t2", " t3", " t4")


def test_strong_suppression_does_not_hide_a_promotion():
    assert names([1.2, *NOISE[1:]], bottom=np.linspace(9.0, 5.0, 10)) == (" t0",)


def test_no_logits_promote_nothing():
    assert names([], []) == ()
    assert names([0.0, 0.0], [0.0]) == ()


def test_promoted_tokens_are_named_in_the_text():
    top = [(" Texas", 2.0), *((f" t{n}", value) for n, value in enumerate(NOISE))]
    material = examples(lambda texts, at: float(texts[at] == " of"), top=top, bottom=[(" no", -0.3), (" x", -0.3)])
    explanation = explainer().explain(material)
    assert explanation.text == 'fires on "of"; promotes " Texas"'
    assert explanation.promotes == (" Texas",)
    assert explanation.words == ("of",)


def bare(n_active: int, train: tuple[Window, ...] = ()) -> Examples:
    return Examples(0, 3, n_active, train, (), logits([9.0, *NOISE]), logits(NOISE, -1))


def test_a_dead_feature_gets_no_explanation():
    explanation = explainer(n_tokens=1234567).explain(bare(0))
    assert explanation.text == "dead: never fires in 1,234,567 tokens"
    assert (explanation.rule, explanation.words, explanation.promotes) == (None, (), ())


def test_a_rare_feature_is_said_to_be_rare():
    once = Window((" a",), np.array([1.0]))
    explanation = explainer(min_windows=2).explain(bare(1, (once,)))
    assert explanation.text == 'rare: fires on 1 of 120,000 tokens, too few to explain; promotes " t0"'
    assert explanation.rule is None


def test_weights_rise_with_activation_and_none_is_given_up():
    evidence = evidence_of([Window((" a", " b", " c"), np.array([0.0, 1.0, 3.0]))])
    assert evidence.weight.tolist() == [0.0, 0.75, 1.25]
    assert evidence.weight[evidence.fires].mean() == pytest.approx(1.0)


def test_what_a_rule_misses_is_said():
    def plant(texts, at):
        # Half of the activation is on no pattern at all.
        return float(texts[at] == " of") or float((hash_of(texts, at) % 19) == 0)

    assert "% of its activation)" in explainer().explain(examples(plant)).text


def hash_of(texts, at):
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("".join(texts[: at + 1])))


def test_it_is_an_explainer():
    assert isinstance(explainer(), Explainer)
