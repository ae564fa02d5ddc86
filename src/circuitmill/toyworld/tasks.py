"""Scoring a language model, or its replacement, on tasks with known answers.

An item is plain data. What counts as right is the task's rule:

| rule | an item's keys | right when |
|---|---|---|
| first_token | prompt, answer | the most probable next token is the answer's first |
| whole_answer | prompt, answer | every token of the answer is the most probable, given those before |
| mass_above | prompt, above | the two-digit numbers above `above` get more than 0.9 of the probability |
| agreement | prompt, good, bad | good next words beat bad ones in sum, and the most probable token is good |
| brackets | prompt, answer, foils | the answer is more probable than each foil |
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuitmill.errors import StoreError

Item = dict[str, Any]
LogitsFn = Callable[[Int[Tensor, "item pos"]], Float[Tensor, "item pos d_vocab"]]

MASS = 0.9
"""What `mass_above` demands."""
_BATCH = 512
"""Items per call of the model."""


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task."""

    accuracy: float
    n: int
    """Items scored."""


class Encoder:
    """Token ids of texts, without special tokens; remembers what it has encoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        bos_id: Any = tokenizer.bos_token_id
        self.bos_id: int = bos_id

    def learn(self, texts: list[str]) -> None:
        """Encode many texts at once, which is faster than one by one."""
        ids: Any = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        self._known.update(zip(texts, ids, strict=True))

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self._known:
            self.learn([text])
        return self._known[text]

    def first(self, text: str) -> int:
        """Id of a text's first token."""
        return self(text)[0]


def score_tasks(
    tasks: dict[str, dict], tokenizer: PreTrainedTokenizerBase, logits_fn: LogitsFn, limit: int | None = None
) -> dict[str, TaskScore]:
    """Score every task; BOS is put in front of each prompt.

    Args:
        tasks: As in truth.json: name -> rule and items.
        limit: Score at most this many items per task, evenly spread over the task.

    Raises:
        StoreError: a task has an unknown rule or no items.
    """
    encoder = Encoder(tokenizer)
    return {name: _score(name, task, encoder, logits_fn, limit) for name, task in tasks.items()}


def _score(name: str, task: dict, encoder: Encoder, logits_fn: LogitsFn, limit: int | None) -> TaskScore:
    items = task["items"]
    if task["rule"] not in RULES or not items:
        raise StoreError(
            f"a task with items and a rule among {', '.join(RULES)}",
            found=f"{len(items)} items, rule {task['rule']!r}",
            where=f"tasks.{name} of truth.json",
            fix="rerun stage toyworld",
        )
    if limit is not None and len(items) > limit:
        items = [items[index * len(items) // limit] for index in range(limit)]
    encoder.learn([item["prompt"] for item in items])
    suffix_of, judge = RULES[task["rule"]]
    by_length: dict[tuple[int, int], list[tuple[Item, list[int]]]] = defaultdict(list)
    for item in items:
        suffix = suffix_of(item, encoder)
        ids = [encoder.bos_id, *encoder(item["prompt"]), *suffix]
        by_length[len(ids), len(suffix)].append((item, ids))
    right = 0
    for (_, n_suffix), group in by_length.items():
        for chunk in _chunks(group):
            logits = logits_fn(torch.tensor([ids for _, ids in chunk]))[:, -1 - n_suffix :]
            right += sum(judge([item for item, _ in chunk], logits.float().softmax(-1), encoder))
    return TaskScore(accuracy=right / len(items), n=len(items))


def longest_item(tokenizer: PreTrainedTokenizerBase, task: dict) -> int:
    """Tokens that a model must read to be scored on a task, BOS included."""
    encoder = Encoder(tokenizer)
    encoder.learn([item["prompt"] for item in task["items"]])
    suffix_of, _ = RULES[task["rule"]]
    return max(1 + len(encoder(item["prompt"])) + len(suffix_of(item, encoder)) for item in task["items"])


def _chunks(group: list) -> Iterator[list]:
    for start in range(0, len(group), _BATCH):
        yield group[start : start + _BATCH]


# Each rule: which tokens to append to the prompt, and verdicts from the probabilities after the prompt and after
# each appended token.


def _no_suffix(item: Item, encoder: Encoder) -> list[int]:
    return []


def _answer_but_last(item: Item, encoder: Encoder) -> list[int]:
    return encoder(item["answer"])[:-1]


def _tens_digit(item: Item, encoder: Encoder) -> list[int]:
    return [_digits(encoder)[item["above"] // 10]]


def _digits(encoder: Encoder) -> list[int]:
    return [encoder.first(digit) for digit in "0123456789"]


def _first_token(items: list[Item], p: Float[Tensor, "item pos d_vocab"], encoder: Encoder) -> list[bool]:
    best = p[:, -1].argmax(-1).tolist()
    return [token == encoder.first(item["answer"]) for token, item in zip(best, items, strict=True)]


def _whole_answer(items: list[Item], p: Float[Tensor, "item pos d_vocab"], encoder: Encoder) -> list[bool]:
    best = p.argmax(-1).tolist()
    return [tokens == encoder(item["answer"]) for tokens, item in zip(best, items, strict=True)]


def _mass_above(items: list[Item], p: Float[Tensor, "item pos d_vocab"], encoder: Encoder) -> list[bool]:
    digits = p[:, :, _digits(encoder)]
    right = []
    for item, (first, second) in zip(items, digits, strict=True):
        tens, units = divmod(item["above"], 10)
        # P(number > above) = P(larger tens digit) + P(same tens digit) P(larger units digit | same tens digit)
        mass = first[tens + 1 :].sum() + first[tens] * second[units + 1 :].sum()
        right.append(mass.item() > MASS)
    return right


def _agreement(items: list[Item], p: Float[Tensor, "item pos d_vocab"], encoder: Encoder) -> list[bool]:
    right = []
    for item, row in zip(items, p[:, -1], strict=True):
        good, bad = ([encoder.first(word) for word in item[key]] for key in ("good", "bad"))
        right.append(bool(row[good].sum() > row[bad].sum()) and row.argmax().item() in good)
    return right


def _brackets(items: list[Item], p: Float[Tensor, "item pos d_vocab"], encoder: Encoder) -> list[bool]:
    right = []
    for item, row in zip(items, p[:, -1], strict=True):
        answer = row[encoder.first(item["answer"])]
        right.append(all(bool(answer > row[encoder.first(foil)]) for foil in item["foils"]))
    return right


RULES: dict[str, tuple[Callable, Callable]] = {
    "first_token": (_no_suffix, _first_token),
    "whole_answer": (_answer_but_last, _whole_answer),
    "mass_above": (_tens_digit, _mass_above),
    "agreement": (_no_suffix, _agreement),
    "brackets": (_no_suffix, _brackets),
}
"""Rule -> (tokens to append, verdicts)."""
