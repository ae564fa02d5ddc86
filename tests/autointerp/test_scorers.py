from dataclasses import dataclass

import numpy as np
import pytest

from circuitmill.autointerp.clients import Completion
from circuitmill.autointerp.examples import Window
from circuitmill.autointerp.explain import Explanation
from circuitmill.autointerp.scorers import NOT_SCORED, detection, detection_question
from circuitmill.errors import ClientError

EXPLANATION = Explanation("fires on cats", "by hand", rule="{}")
WINDOWS = tuple(Window((" a",), np.array([float(fires)])) for fires in (1, 1, 1, 1, 0, 0))


@dataclass
class Says:
    """A client that always gives the same answer."""

    text: str
    name: str = "parrot"
    timeout_seconds: float = 1.0
    retries: int = 0

    def complete(self, messages):
        self.asked = messages
        return Completion(self.text, 0, 0)


def test_scores_by_hand():
    score = detection(EXPLANATION, WINDOWS, Says("[1, 1, 1, 0, 1, 0]"), min_windows=2)
    assert score.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert score.precision == pytest.approx(3 / 4)
    assert score.recall == pytest.approx(3 / 4)
    assert score.n == 6


@pytest.mark.parametrize("answer", ["[0, 0, 0, 0, 0, 0]", "[1, 1, 1, 1, 1, 1]"])
def test_saying_the_same_of_every_window_is_chance(answer):
    score = detection(EXPLANATION, WINDOWS, Says(answer), min_windows=2)
    assert score.balanced_accuracy == 0.5
    assert (score.precision is None) == (answer[1] == "0")


def test_too_few_windows_are_not_scored():
    assert detection(EXPLANATION, WINDOWS, Says("[]"), min_windows=3) == NOT_SCORED
    assert detection(EXPLANATION, WINDOWS[:4], Says("[]"), min_windows=1) == NOT_SCORED
    assert detection(EXPLANATION, (), Says("[]"), min_windows=1) == NOT_SCORED


def test_an_explanation_without_a_rule_is_not_scored():
    assert detection(Explanation("dead", "by hand"), WINDOWS, Says("[]"), min_windows=1) == NOT_SCORED


@pytest.mark.parametrize("answer", ["yes", "[1, 1]", "{}", "[1, 1, 1, 1, 2, 0]", '["1", 1, 1, 1, 1, 1]'])
def test_an_unusable_answer_is_an_error(answer):
    with pytest.raises(ClientError, match="a JSON list of 6 numbers") as caught:
        detection(EXPLANATION, WINDOWS, Says(answer), min_windows=1)
    assert "client parrot" in str(caught.value)


def test_the_question_holds_no_activation():
    windows = (Window((" a", " b"), np.array([0.0, 123.5])),)
    (message,) = detection_question(EXPLANATION, windows)
    assert "123" not in message.content
    assert '[" a", " b"]' in message.content
    assert "fires on cats" in message.content
