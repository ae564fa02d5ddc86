"""Prompts as token ids, BOS in front."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuitmill.errors import ConfigError, UpstreamError


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, name: str, bos_id: int, context: int
) -> Int[Tensor, " pos"]:
    """Token ids of a prompt, BOS first.

    Args:
        name: Of the prompt, for messages.
        context: Most tokens the model takes, BOS included.

    Raises:
        ConfigError: the prompt is empty or longer than the context.
    """
    ids = [bos_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    if len(ids) < 2:
        raise ConfigError(
            "a prompt of at least one token",
            found=repr(prompt),
            where=f"prompt {name}",
            fix="write some text",
        )
    if len(ids) > context:
        raise ConfigError(
            f"a prompt of at most {context} tokens, BOS included (the model's context)",
            found=f"{len(ids)} tokens in {prompt[:60]!r}",
            where=f"prompt {name}",
            fix="shorten the prompt",
        )
    return torch.tensor(ids)


def last_position(tokenizer: PreTrainedTokenizerBase, prompt: str, phrase: str) -> int:
    """Position of the last token of a phrase's first occurrence, counted with BOS at 0.

    Raises:
        UpstreamError: the phrase does not occur, or a token reaches across its end.
    """
    start = prompt.find(phrase)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    head = tokenizer(prompt[: start + len(phrase)], add_special_tokens=False).input_ids
    if start < 0 or ids[: len(head)] != head:
        raise UpstreamError(
            "a phrase of the prompt that ends where a token ends",
            found=repr(phrase),
            where=f"prompt {prompt!r}",
            fix="correct the circuit's `after` in truth.json",
        )
    return len(head)
