import pytest
from transformers import PreTrainedTokenizerBase

from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.graphs.prompts import encode, last_position


def test_bos_is_in_front(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "ab", name="x", bos_id=1, context=32)
    assert ids.tolist() == [1, *tokenizer("ab").input_ids]


def test_prompt_longer_than_the_context_names_prompt_tokens_and_context(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert len(encode(tokenizer, "a" * 31, name="x", bos_id=1, context=32)) == 32
    with pytest.raises(ConfigError, match=r"at most 32 tokens.*found 33 tokens in 'aaaa") as caught:
        encode(tokenizer, "a" * 32, name="long-one", bos_id=1, context=32)
    assert "prompt long-one" in str(caught.value)


def test_empty_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="at least one token") as caught:
        encode(tokenizer, "", name="nothing", bos_id=1, context=32)
    assert "prompt nothing" in str(caught.value)


def test_last_position_counts_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    assert last_position(tokenizer, "in Dallas is", "Dallas") == len("in Dallas")
    assert last_position(tokenizer, "Dallas and Dallas", "Dallas") == 6


def test_phrase_that_is_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UpstreamError, match="found 'Austin'"):
        last_position(tokenizer, "in Dallas is", "Austin")
