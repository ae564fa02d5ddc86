import re

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.errors import StoreError
from circuitmill.toyworld.questions import BEYOND, all_tasks
from circuitmill.toyworld.tasks import Encoder, TaskScore, longest_item, score_tasks
from circuitmill.toyworld.world import World

CLOSING = dict(zip("([{<", ")]}>", strict=True))


class Oracle:
    """Answers like one who knows: puts probability on the right next tokens, looked up by the prompt's tokens."""

    def __init__(self, tasks: dict, tokenizer: PreTrainedTokenizerFast):
        self.n_vocab = len(tokenizer)
        self.next: dict[tuple[int, ...], list[int]] = {}
        encoder = Encoder(tokenizer)
        for task in tasks.values():
            for item in task["items"]:
                ids = (encoder.bos_id, *encoder(item["prompt"]))
                for continuation in self.right(task["rule"], item):
                    tokens = encoder(continuation)
                    for k, token in enumerate(tokens):
                        self.next.setdefault((*ids, *tokens[:k]), []).append(token)

    @staticmethod
    def right(rule: str, item: dict) -> list[str]:
        if rule == "mass_above":
            return [f"{year:02d}" for year in range(item["above"] + 1, 100)]
        return item["good"][:1] if rule == "agreement" else [item["answer"]]

    def __call__(self, tokens: Int[Tensor, "item pos"]) -> Float[Tensor, "item pos d_vocab"]:
        logits = torch.zeros(*tokens.shape, self.n_vocab)
        for row, ids in enumerate(tokens.tolist()):
            for pos in range(len(ids)):
                for token in self.next.get(tuple(ids[: pos + 1]), []):
                    logits[row, pos, token] = 20.0
        return logits


@pytest.fixture(scope="module")
def tasks(world: World) -> dict:
    return all_tasks(world)


def test_one_who_knows_gets_everything_right(tasks: dict, tokenizer: PreTrainedTokenizerFast):
    scores = score_tasks(tasks, tokenizer, Oracle(tasks, tokenizer), limit=60)
    assert {name: score.accuracy for name, score in scores.items()} == dict.fromkeys(tasks, 1.0)


def test_the_opposite_of_one_who_knows_gets_everything_wrong(tasks: dict, tokenizer: PreTrainedTokenizerFast):
    oracle = Oracle(tasks, tokenizer)
    scores = score_tasks(tasks, tokenizer, lambda tokens: -oracle(tokens), limit=60)
    assert {name: score.accuracy for name, score in scores.items()} == dict.fromkeys(tasks, 0.0)


def test_a_limit_spreads_over_the_task(tokenizer: PreTrainedTokenizerFast):
    items = [{"prompt": "a", "answer": "a"}] * 5 + [{"prompt": "a", "answer": "b"}] * 5
    tasks = {"task": {"rule": "first_token", "items": items}}
    (a,) = Encoder(tokenizer)("a")

    def always_a(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full(tokens.shape, a), len(tokenizer)).float()

    assert score_tasks(tasks, tokenizer, always_a) == {"task": TaskScore(0.5, 10)}
    assert score_tasks(tasks, tokenizer, always_a, limit=4) == {"task": TaskScore(0.5, 4)}
    assert score_tasks(tasks, tokenizer, always_a, limit=50) == {"task": TaskScore(0.5, 10)}


@pytest.mark.parametrize(
    ("tens", "units", "expected"),
    [
        ({"4": 1.0}, {}, 1.0),
        ({"3": 1.0}, {"8": 1.0}, 1.0),
        ({"3": 1.0}, {"7": 1.0}, 0.0),
        ({"3": 0.5, "5": 0.5}, {"9": 0.85, "0": 0.15}, 1.0),
        ({"3": 0.5, "5": 0.5}, {"9": 0.75, "0": 0.25}, 0.0),
        ({"2": 1.0}, {"9": 1.0}, 0.0),
    ],
)
def test_mass_above_adds_both_digits(tens: dict, units: dict, expected: float, tokenizer: PreTrainedTokenizerFast):
    tasks = {"task": {"rule": "mass_above", "items": [{"prompt": "17", "above": 37}]}}

    def logits(tokens: Tensor) -> Tensor:
        p = torch.full((1, tokens.shape[1], len(tokenizer)), 1e-9)
        for pos, digits in ((-2, tens), (-1, units)):
            for digit, mass in digits.items():
                p[0, pos, Encoder(tokenizer)(digit)[0]] = mass
        return p.log()

    assert score_tasks(tasks, tokenizer, logits)["task"].accuracy == expected


def test_an_unknown_rule_is_an_error(tokenizer: PreTrainedTokenizerFast):
    tasks = {"task": {"rule": "guess", "items": [{"prompt": "a", "answer": "b"}]}}
    with pytest.raises(StoreError, match=r"rule among first_token.*found 1 items, rule 'guess'\n.*tasks.task"):
        score_tasks(tasks, tokenizer, lambda tokens: torch.zeros(*tokens.shape, len(tokenizer)))
    with pytest.raises(StoreError, match="0 items"):
        score_tasks({"task": {"rule": "brackets", "items": []}}, tokenizer, lambda tokens: torch.zeros(1, 1, 1))


def test_answers_of_the_facts_are_one_token(tasks: dict, tokenizer: PreTrainedTokenizerFast):
    for name, task in tasks.items():
        if name.startswith(("one_hop", "two_hop", "animals", "ioi")):
            assert all(len(Encoder(tokenizer)(item["answer"])) == 1 for item in task["items"]), name


@pytest.mark.parametrize("option", ["default_cfg", "tiny_cfg"])
def test_questions_fit_the_context(option: str, tasks: dict, tokenizer: PreTrainedTokenizerFast, request):
    cfg: ToyworldConfig = request.getfixturevalue(option)
    assert max(longest_item(tokenizer, task) for task in tasks.values()) <= cfg.transformer.context


def test_longest_item_counts_bos_and_what_is_appended(tokenizer: PreTrainedTokenizerFast):
    item = {"prompt": "36+59=", "answer": "95"}
    assert longest_item(tokenizer, {"rule": "whole_answer", "items": [item]}) == 1 + 6 + 1
    assert longest_item(tokenizer, {"rule": "first_token", "items": [item]}) == 1 + 6


def test_bracket_answers_close_the_last_open_bracket(tasks: dict):
    for item in tasks["brackets"]["items"]:
        waiting = []
        for symbol in item["prompt"].split()[1:]:
            if symbol in CLOSING:
                waiting.append(symbol)
            else:
                assert symbol == CLOSING[waiting.pop()]
        assert item["answer"].strip() == CLOSING[waiting[-1]]
        assert {foil.strip() for foil in item["foils"]} == set(")]}>") - {item["answer"].strip()}


def test_addition_answers_are_sums(tasks: dict):
    for item in tasks["addition"]["items"]:
        a, b = map(int, re.fullmatch(r"(\d\d)\+(\d\d)=", item["prompt"]).groups())
        assert int(item["answer"]) == a + b


def test_what_is_beyond_the_model_is_a_task(tasks: dict):
    assert set(BEYOND) < set(tasks)
