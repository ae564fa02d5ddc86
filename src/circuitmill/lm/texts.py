"""Tokens as people read them: the text of single tokens, and the word around a position with those before."""

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

_SENTENCEPIECE_SPACE = "▁"
_INCOMPLETE = "\ufffd"
_LONGEST_WORD = 16
"""Tokens; scripts without spaces would otherwise make words of whole paragraphs."""


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of every token of the vocabulary, spaces in front included.

    A token that is part of a character only has no text of its own and is shown by its bytes, as `<0xC3>`,
    the way sentencepiece writes them.
    """
    return [_token_text(tokenizer, token) for token in range(len(tokenizer))]


def _token_text(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if _INCOMPLETE in text and isinstance(piece, str) and _INCOMPLETE not in piece:
        return "".join(f"<0x{byte:02X}>" for byte in _bytes_of(piece)) or text
    if isinstance(piece, str) and piece.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" "):
        # sentencepiece decoders drop the space in front of what they take for a whole text
        return f" {text}"
    return text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table of bytes: printable ones stand for themselves, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _bytes_of(piece: str) -> list[int]:
    written = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if written:
        return [int(written[1], 16)]
    return [_BYTES[character] for character in piece if character in _BYTES]


class Words:
    """Finds words in token sequences, where a word may be several tokens.

    A word is a run of tokens of which each but the first continues it: its text starts with a letter, a digit
    or part of a character, and so ended the token before. Anything else is a word by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, bos_id: int) -> None:
        self.texts = token_texts(tokenizer)
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._partial = [bool(re.search(r"<0x[0-9A-F]{2}>", text)) for text in self.texts]
        pairs = list(zip(self.texts, self._partial, strict=True))
        self._opens = [partial or text[:1].isalnum() for text, partial in pairs]
        self._closes = [partial or text[-1:].isalnum() for text, partial in pairs]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens together."""
        if any(self._partial[token] for token in tokens):
            return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return "".join(self.texts[token] for token in tokens)

    def _continues(self, tokens: Sequence[int], pos: int) -> bool:
        return (
            pos > 0
            and self._bos_id not in tokens[pos - 1 : pos + 1]
            and (self._closes[tokens[pos - 1]] and self._opens[tokens[pos]])
        )

    def around(self, tokens: Sequence[int] | np.ndarray, pos: int, n_before: int) -> tuple[str, str]:
        """The whole word that a position lies in, and the words before it in the same document.

        Args:
            tokens: A whole sequence; BOS separates documents.
            pos: Where in the sequence.
            n_before: At most so many words, split at white space.

        Returns:
            The word without spaces around it, and the words before with single spaces between them.
        """
        # words of eight tokens are rare; the bounds keep long sequences cheap
        low = max(pos - _LONGEST_WORD - 8 * n_before - 1, 0)
        near = [int(token) for token in tokens[low : pos + _LONGEST_WORD]]
        here = pos - low
        start, stop = here, here + 1
        while self._continues(near, start) and here - start < _LONGEST_WORD:
            start -= 1
        while stop < len(near) and self._continues(near, stop):
            stop += 1
        opening = start
        # where the sequence was cut, the first token only tells whether the next one begins a word
        while opening > (1 if low else 0) and near[opening - 1] != self._bos_id:
            opening -= 1
        while opening < start and self._continues(near, opening):
            opening += 1
        before = self.text(near[opening:start]).split()
        return self.text(near[start:stop]).strip(), " ".join(before[len(before) - min(n_before, len(before)) :])
