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
    return {name: _score(name, task, tokenizer, logits_fn, limit) for name, task in tasks.items()}


def _score(
    name: str, task: dict, tokenizer: PreTrainedTokenizerBase, logits_fn: LogitsFn, limit: int | None
) -> TaskScore:
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
    suffix_of, judge = RULES[task["rule"]]
    by_length: dict[tuple[int, int], list[tuple[Item, list[int]]]] = defaultdict(list)
    for item in items:
        suffix = suffix_of(item, tokenizer)
        ids = [tokenizer.bos_token_id, *encode(tokenizer, item["prompt"]), *suffix]
        by_length[len(ids), len(suffix)].append((item, ids))
    right = 0
    for (_, n_suffix), group in by_length.items():
        for chunk in _chunks(group):
            logits = logits_fn(torch.tensor([ids for _, ids in chunk]))[:, -1 - n_suffix :]
            probabilities = logits.float().softmax(-1)
            right += sum(
                judge(item, row, tokenizer) for (item, _), row in zip(chunk, probabilities, strict=True)
            )
    return TaskScore(accuracy=right / len(items), n=len(items))


def _chunks(group: list) -> Iterator[list]:
    for start in range(0, len(group), _BATCH):
        yield group[start : start + _BATCH]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of a text's first token."""
    return encode(tokenizer, text)[0]


# Each rule: which tokens to append to the prompt, and a verdict from the probabilities after the prompt and
# after each appended token.


def _no_suffix(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return []


def _answer_but_last(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode(tokenizer, item["answer"])[:-1]


def _tens_digit(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [_digits(tokenizer)[item["above"] // 10]]


def _digits(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [first_token(tokenizer, digit) for digit in "0123456789"]


def _first_token(item: Item, p: Float[Tensor, "pos d_vocab"], tokenizer: PreTrainedTokenizerBase) -> bool:
    return p[-1].argmax().item() == first_token(tokenizer, item["answer"])


def _whole_answer(item: Item, p: Float[Tensor, "pos d_vocab"], tokenizer: PreTrainedTokenizerBase) -> bool:
    return p.argmax(-1).tolist() == encode(tokenizer, item["answer"])


def _mass_above(item: Item, p: Float[Tensor, "pos d_vocab"], tokenizer: PreTrainedTokenizerBase) -> bool:
    tens, units = divmod(item["above"], 10)
    digits = _digits(tokenizer)
    # P(number > above) = P(larger tens digit) + P(same tens digit) P(larger units digit | same tens digit)
    mass = p[0, digits[tens + 1 :]].sum() + p[0, digits[tens]] * p[1, digits[units + 1 :]].sum()
    return mass.item() > MASS


def _agreement(item: Item, p: Float[Tensor, "pos d_vocab"], tokenizer: PreTrainedTokenizerBase) -> bool:
    good, bad = ([first_token(tokenizer, word) for word in item[key]] for key in ("good", "bad"))
    return bool(p[-1, good].sum() > p[-1, bad].sum()) and p[-1].argmax().item() in good


def _brackets(item: Item, p: Float[Tensor, "pos d_vocab"], tokenizer: PreTrainedTokenizerBase) -> bool:
    answer = p[-1, first_token(tokenizer, item["answer"])]
    return all(bool(answer > p[-1, first_token(tokenizer, foil)]) for foil in item["foils"])


RULES: dict[str, tuple[Callable, Callable]] = {
    "first_token": (_no_suffix, _first_token),
    "whole_answer": (_answer_but_last, _whole_answer),
    "mass_above": (_tens_digit, _mass_above),
    "agreement": (_no_suffix, _agreement),
    "brackets": (_no_suffix, _brackets),
}
"""Rule -> (tokens to append, verdict)."""
