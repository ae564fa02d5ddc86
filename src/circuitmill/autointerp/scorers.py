"""How well an explanation predicts its feature, on windows that it was not made from.

A scorer takes an explanation, windows and a client. It never shows the client an activation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from circuitmill.autointerp.clients import Client, Message, ask
from circuitmill.autointerp.examples import Window
from circuitmill.autointerp.explain import Explanation
from circuitmill.errors import ClientError


@dataclass(frozen=True)
class Score:
    """Detection of one feature: for each window, does the feature fire anywhere in it?"""

    balanced_accuracy: float | None
    """Mean of the shares of firing and of silent windows told right; .5 is chance. None: too few windows."""
    precision: float | None
    """Share of the windows said to fire that do; None if none was said to."""
    recall: float | None
    """Share of the firing windows that were found."""
    n: int
    """Windows that were judged."""


NOT_SCORED = Score(None, None, None, 0)
"""There was nothing to score, or too little."""


def detection_question(explanation: Explanation, windows: Sequence[Window]) -> list[Message]:
    """The task as one message: JSON with the explanation, its rule and the tokens of every window."""
    task = {
        "task": "A JSON list: 1 for each window in which, by the explanation, the feature fires, else 0.",
        "explanation": explanation.text,
        "rule": explanation.rule,
        "windows": [window.texts for window in windows],
    }
    return [Message("user", json.dumps(task, ensure_ascii=False))]


def detection(explanation: Explanation, windows: Sequence[Window], client: Client, *, min_windows: int) -> Score:
    """Balanced accuracy, precision and recall of telling firing windows from silent ones.

    Args:
        windows: Held out; both kinds in any order.
        min_windows: Fewer firing, or fewer silent, windows than this are not scored.

    Raises:
        ClientError: the client failed, or did not answer with one 0 or 1 per window.
    """
    truth = [window.fires for window in windows]
    positives, negatives = sum(truth), len(truth) - sum(truth)
    if explanation.rule is None or min(positives, negatives) < min_windows:
        return NOT_SCORED

    def read(text: str) -> list[bool]:
        return _read_answer(text, len(windows), client.name)

    said = ask(client, detection_question(explanation, windows), read)
    hits = sum(t and s for t, s in zip(truth, said, strict=True))
    false_alarms = sum(said) - hits
    return Score(
        balanced_accuracy=(hits / positives + 1 - false_alarms / negatives) / 2,
        precision=hits / sum(said) if any(said) else None,
        recall=hits / positives,
        n=len(windows),
    )


def _read_answer(text: str, n: int, client: str) -> list[bool]:
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, list) or len(answer) != n or not all(item in (0, 1) for item in answer):
        raise ClientError(
            f"a JSON list of {n} numbers, each 0 or 1",
            found=repr(text[:80]),
            where=f"client {client}",
            fix="ask again, or use another client",
        )
    return [bool(item) for item in answer]
