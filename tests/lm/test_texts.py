from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuitmill.lm.texts import Words, token_texts

BOS = 1


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """Byte-level pieces of two characters, with a space in front where a word begins."""
    vocabulary = [
        "<pad>",
        "<bos>",
        "ĠD",
        "Da",
        "ĠDal",
        "las",
        "Ġis",
        "Ġin",
        ".",
        "ĠTexas",
        "Ã",
        "©",
        "Ġcaf",
        "1",
        "7",
        "+",
    ]
    core = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "▁the": 2, "▁Tex": 3, "as": 4, "<0xC3>": 5, "▁": 6}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def ids(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(texts))


def test_single_tokens_read_as_in_the_text(pieces: PreTrainedTokenizerFast) -> None:
    texts = token_texts(pieces)
    assert texts[4] == " Dal" and texts[5] == "las" and texts[8] == "."
    assert texts[BOS] == "<bos>"
    assert texts[10] == "<0xC3>" and texts[11] == "<0xA9>", "half a character is shown by its byte"


def test_sentencepiece_keeps_the_space_in_front(sentencepiece: PreTrainedTokenizerFast) -> None:
    assert token_texts(sentencepiece)[2:6] == [" the", " Tex", "as", "<0xC3>"]


def test_a_word_of_several_tokens_comes_out_whole(pieces: PreTrainedTokenizerFast) -> None:
    words = Words(pieces, BOS)
    tokens = [BOS, *ids(pieces, "ĠTexas", "Ġis", "Ġin", "ĠDal", "las", ".", "Ġis")]
    for pos in (4, 5):
        assert words.around(tokens, pos, n_before=5) == ("Dallas", "Texas is in")
    assert words.around(tokens, 5, n_before=2) == ("Dallas", "is in")
    assert words.around(tokens, 6, n_before=1) == (".", "Dallas")
    assert words.around(tokens, 1, n_before=5) == ("Texas", "")


def test_words_end_at_documents(pieces: PreTrainedTokenizerFast) -> None:
    words = Words(pieces, BOS)
    tokens = [*ids(pieces, "ĠTexas", "ĠDal"), BOS, *ids(pieces, "las", "Ġis")]
    assert words.around(tokens, 3, n_before=5) == ("las", "")
    assert words.around(tokens, 4, n_before=5) == ("is", "las")
    assert words.around(tokens, 1, n_before=5) == ("Dal", "Texas")


def test_numbers_and_split_characters(pieces: PreTrainedTokenizerFast) -> None:
    words = Words(pieces, BOS)
    sum_ = [BOS, *ids(pieces, "1", "7", "+", "7", "1")]
    assert words.around(sum_, 2, n_before=5) == ("17", "")
    assert words.around(sum_, 4, n_before=5) == ("71", "17+")
    cafe = [BOS, *ids(pieces, "Ġcaf", "Ã", "©", "Ġis")]
    assert [words.around(cafe, pos, n_before=5)[0] for pos in (1, 2, 3)] == ["café"] * 3


def test_a_script_without_spaces_does_not_make_endless_words(pieces: PreTrainedTokenizerFast) -> None:
    words = Words(pieces, BOS)
    word, before = words.around(ids(pieces, *["Da"] * 200), 100, n_before=5)
    assert len(word) <= 2 * 33 and len(before) <= 2 * 200


def test_every_byte_of_a_byte_tokenizer_has_a_text(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = token_texts(tokenizer)
    assert len(texts) == len(tokenizer) == len(set(texts))
    encoded = tokenizer("Été in Dallas", add_special_tokens=False)["input_ids"]
    words = Words(tokenizer, BOS)
    assert words.text(encoded) == "Été in Dallas"
    assert words.around(encoded, 2, n_before=3)[0] == "Été"
