"""What can be said about a token from the text around it: the columns that rules are written in.

Tokens are pieces of words: a rule about "Dallas" has to see `' Da'`, `'ll'`, `'as'` as one word. A token
opens a new word if it begins with white space or if its first character is of another class than the last one
before it (letters join letters, digits join digits, everything else stands alone). A special token such as
`<|endoftext|>` opens a new text.

| column | value for the token `'as'` of `' capital of Dallas'` |
|---|---|
| token | the token, with its space: `as` |
| prefix | the word so far, all that a causal model can know: `Dallas` |
| word | the whole word: `Dallas` |
| kind | of the word so far: capitalised word |
| piece | first, middle, last or whole |
| nth | number of the piece in its word: 3 |
| back1, back2, back3 | the words before: `of`, `capital`, ...; empty for the start of the text |
| place | number of the word in its text, if the start is in the window |
| again | repeated if the word so far occurred earlier in the text, else new |
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Bool, Int

COLUMNS = ("token", "prefix", "word", "kind", "piece", "nth", "back1", "back2", "back3", "place", "again")
"""The columns, in the order of the codes."""

TEXT_START = ""
"""Stands in `back1`, `back2` and `back3` for the start of the text."""

_UNKNOWN = -1
_CUT = (_UNKNOWN, _UNKNOWN)
_NUMBERED = 5
_SPECIAL = re.compile(r"<\|?[^<>\s|]+\|?>|\[[A-Z]{3,}\]")
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
_IDEOGRAPH = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_ALONE = ("ideograph", "mark", "space", "special")


@dataclass(frozen=True)
class _Shape:
    spaced: bool
    """Begins with white space."""
    head: str
    """Class of the first character."""
    tail: str
    """Class of the last character."""
    core: str
    """The text without surrounding spaces; the text itself if nothing is left."""


def _character_class(character: str) -> str:
    if _IDEOGRAPH.match(character):
        return "ideograph"
    # A token may end inside a character; the replacement sign then stands for a part of a letter.
    if character.isalpha() or character == "\N{REPLACEMENT CHARACTER}":
        return "letter"
    return "digit" if character.isdigit() else "mark"


@lru_cache(maxsize=1 << 20)
def _shape(text: str) -> _Shape:
    if _BYTES.fullmatch(text):
        return _Shape(False, "letter", "letter", text)
    if _SPECIAL.fullmatch(text):
        return _Shape(False, "special", "special", text)
    core = text.strip()
    if not core:
        return _Shape(True, "space", "space", text)
    head = _character_class(core[0])
    # An apostrophe before a letter continues the word: "don" + "'t".
    if len(core) > 1 and core[0] in "'’" and core[1].isalpha():
        head = "letter"
    return _Shape(text[0].isspace(), head, _character_class(core[-1]), core)


@lru_cache(maxsize=1 << 20)
def kind_of(prefix: str) -> str:
    """The kind of a word, from its beginning, as it is written in explanations.

    Example:
        >>> kind_of("Dal"), kind_of("TX"), kind_of("17"), kind_of(","), kind_of("of")
        ('capitalised word', 'word in capitals', 'number', 'punctuation', 'lowercase word')
    """
    shape = _shape(prefix)
    if shape.head == "special":
        return "special token"
    if shape.head == "space":
        return "line break" if "\n" in prefix else "space"
    if shape.head == "digit":
        return "number"
    if shape.head == "mark":
        return "punctuation"
    if shape.head == "ideograph":
        return "ideograph"
    if len(prefix) > 1 and prefix.isupper():
        return "word in capitals"
    return "capitalised word" if prefix[0].isupper() else "lowercase word"


def is_special(text: str) -> bool:
    """Whether a token is a special one, such as the beginning of a text: features never fire there."""
    return _shape(text).head == "special"


@dataclass(frozen=True)
class Columns:
    """The columns of all tokens of some windows, one after the other."""

    codes: dict[str, Int[np.ndarray, " token"]]
    """Column -> code per token; negative where the value is not known (the text before a window)."""
    values: tuple[str, ...]
    """The string of each code."""
    window: Int[np.ndarray, " token"]
    """The window each token is in."""
    usable: Bool[np.ndarray, " token"]
    """Where a feature can fire: every token but the special ones."""
    n_windows: int

    def value(self, column: str, token: int) -> str:
        """The string in one column of one token; empty where it is not known."""
        code = self.codes[column][token]
        return self.values[code] if code >= 0 else ""

    def code(self, value: str) -> int:
        """The code of a string; -2, which no token has, if it does not occur."""
        return self._codes.get(value, -2)

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {value: code for code, value in enumerate(self.values)}


def words_of(texts: Sequence[str]) -> list[tuple[int, int, str]]:
    """Group the tokens of a window into words: first token, one past the last, the word.

    Example:
        >>> words_of([" of", " Da", "ll", "as", "."])
        [(0, 1, 'of'), (1, 4, 'Dallas'), (4, 5, '.')]
    """
    words: list[tuple[int, int, str]] = []
    tail = "special"
    for index, text in enumerate(texts):
        shape = _shape(text)
        if words and not shape.spaced and shape.head == tail and tail not in _ALONE:
            start, _, word = words[-1]
            words[-1] = (start, index + 1, word + shape.core)
        else:
            words.append((index, index + 1, shape.core))
        # White space at the end closes the word.
        tail = "space" if text[-1:].isspace() else shape.tail
    return [(start, stop, _BYTES.sub(_characters, word) if "<0x" in word else word) for start, stop, word in words]


def _characters(match: re.Match) -> str:
    """The characters that tokens like `<0xC3>`, `<0xA9>` make up together."""
    return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace")


class _Codes(dict):
    """String -> code, numbered as they come."""

    def __missing__(self, value: str) -> int:
        code = self[value] = len(self)
        return code


def columns_of(windows: Iterable[Sequence[str]]) -> Columns:
    """Work out every column of every token of some windows."""
    codes = _Codes()
    spelled: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
    start_of_text, new, repeated = codes[TEXT_START], codes["new"], codes["repeated"]
    places = [_UNKNOWN, *(codes[str(number)] for number in range(1, _NUMBERED + 1))]
    rows: list[tuple[int, ...]] = []
    usable: list[bool] = []
    lengths: list[int] = []
    for texts in windows:
        back, place, seen = (_UNKNOWN, _UNKNOWN, _UNKNOWN), 0, set()
        for start, stop, word in words_of(texts):
            pieces = tuple(texts[start:stop])
            spelling = spelled.get(pieces)
            if spelling is None:
                spelling = spelled[pieces] = _spell(pieces, word, codes)
            if start == 0 and _is_cut(texts[0]):
                spelling = tuple((token, *_CUT, kind, *_CUT) for token, _, _, kind, _, _ in spelling)
            context = (*back, places[place] if place <= _NUMBERED else _UNKNOWN)
            for piece in spelling:
                again = _UNKNOWN if piece[1] < 0 else repeated if piece[1] in seen else new
                rows.append((*piece, *context, again))
                seen.add(piece[1])
            special = is_special(pieces[0])
            usable.extend([not special] * len(pieces))
            if special:
                back, place, seen = (start_of_text, _UNKNOWN, _UNKNOWN), 1, set()
            else:
                back, place = (spelling[0][2], back[0], back[1]), place and place + 1
        lengths.append(len(texts))
    table = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    return Columns(
        codes=dict(zip(COLUMNS, np.ascontiguousarray(table), strict=True)),
        values=tuple(codes),
        window=np.repeat(np.arange(len(lengths)), lengths),
        usable=np.array(usable, dtype=bool),
        n_windows=len(lengths),
    )


def _spell(pieces: tuple[str, ...], word: str, codes: _Codes) -> tuple[tuple[int, ...], ...]:
    """The columns of a word's tokens that depend on nothing else: token, prefix, word, kind, piece, nth."""
    rows, prefix = [], ""
    for nth, text in enumerate(pieces, start=1):
        prefix += _shape(text).core
        piece = _piece_name(nth, len(pieces))
        number = codes[str(nth)] if nth <= _NUMBERED else _UNKNOWN
        rows.append((codes[text], codes[prefix], codes[word], codes[kind_of(prefix)], codes[piece], number))
    return tuple(rows)


def _piece_name(nth: int, length: int) -> str:
    if length == 1:
        return "whole"
    return "first" if nth == 1 else "last" if nth == length else "middle"


def _is_cut(first: str) -> bool:
    """Whether a window may begin inside a word: texts begin with a special token, words with white space."""
    shape = _shape(first)
    return not shape.spaced and shape.head in ("letter", "digit")
