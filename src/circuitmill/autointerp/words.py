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
from itertools import accumulate

import numpy as np
from jaxtyping import Bool, Int

COLUMNS = ("token", "prefix", "word", "kind", "piece", "nth", "back1", "back2", "back3", "place", "again")
"""The columns, in the order of the codes."""

TEXT_START = ""
"""Stands in `back1`, `back2` and `back3` for the start of the text."""

_UNKNOWN = -1
_NUMBERED = 5
_SPECIAL = re.compile(r"<\|?[^<>\s|]+\|?>|\[[A-Z]{3,}\]")
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
_IDEOGRAPH = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

_LETTER, _DIGIT, _ALONE, _MARK, _SPACE, _SPECIAL_CLASS = range(6)
"""Classes of characters; from _ALONE (an ideograph) on they never continue a word."""


@dataclass(frozen=True)
class _Shape:
    spaced: bool
    """Begins with white space."""
    head: int
    """Class of the first character that is no space."""
    tail: int
    """Class of the last character."""
    core: str
    """The text without surrounding spaces; the text itself if nothing is left."""


def _character_class(character: str) -> int:
    if _IDEOGRAPH.match(character):
        return _ALONE
    # A token may end inside a character; the replacement sign then stands for a part of a letter.
    if character.isalpha() or character == "\N{REPLACEMENT CHARACTER}":
        return _LETTER
    return _DIGIT if character.isdigit() else _MARK


@lru_cache(maxsize=1 << 20)
def _shape(text: str) -> _Shape:
    if _BYTES.fullmatch(text):
        return _Shape(False, _LETTER, _LETTER, text)
    if _SPECIAL.fullmatch(text):
        return _Shape(False, _SPECIAL_CLASS, _SPECIAL_CLASS, text)
    core = text.strip()
    if not core:
        return _Shape(True, _SPACE, _SPACE, text)
    head = _character_class(core[0])
    # An apostrophe before a letter continues the word: "don" + "'t".
    if len(core) > 1 and core[0] in "'’" and core[1].isalpha():
        head = _LETTER
    tail = _SPACE if text[-1].isspace() else _character_class(core[-1])
    return _Shape(text[0].isspace(), head, tail, core)


@lru_cache(maxsize=1 << 20)
def kind_of(prefix: str) -> str:
    """The kind of a word, from its beginning, as it is written in explanations.

    Example:
        >>> kind_of("Dal"), kind_of("TX"), kind_of("17"), kind_of(","), kind_of("of")
        ('capitalised word', 'word in capitals', 'number', 'punctuation', 'lowercase word')
    """
    shape = _shape(prefix)
    if shape.head == _SPECIAL_CLASS:
        return "special token"
    if shape.head == _SPACE:
        return "line break" if "\n" in prefix else "space"
    if shape.head == _DIGIT:
        return "number"
    if shape.head == _MARK:
        return "punctuation"
    if shape.head == _ALONE:
        return "ideograph"
    if len(prefix) > 1 and prefix.isupper():
        return "word in capitals"
    return "capitalised word" if prefix[0].isupper() else "lowercase word"


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


class _Codes(dict):
    """String -> code, numbered as they come."""

    def __missing__(self, value: str) -> int:
        code = self[value] = len(self)
        return code

    def of(self, values: Iterable[str]) -> Int[np.ndarray, " item"]:
        """The codes of several strings."""
        return np.array([self[value] for value in values], dtype=np.int64)


@dataclass(frozen=True)
class _Spelling:
    """Which tokens make up which word."""

    starts: Int[np.ndarray, " item"]
    """First token of each word."""
    word: Int[np.ndarray, " token"]
    """Number of the word that each token is in."""
    word_code: Int[np.ndarray, " item"]
    """Code of each word."""
    prefix: Int[np.ndarray, " token"]
    """Code of the word up to each token."""
    special: Bool[np.ndarray, " item"]
    """Words that are special tokens."""
    cut: Bool[np.ndarray, " item"]
    """Words that the window may have cut off: texts begin with a special token, words with white space."""


def columns_of(windows: Iterable[Sequence[str]]) -> Columns:
    """Work out every column of every token of some windows."""
    codes = _Codes()
    lengths, texts = [], []
    for window in windows:
        lengths.append(len(window))
        texts.extend(window)
    token, begins = codes.of(texts), np.zeros(len(texts) + 1, dtype=bool)
    begins[np.cumsum([0, *lengths])] = True
    spelling = _spell(token, begins[:-1], codes)
    columns = {"token": token, **_within_words(spelling, codes), **_around_words(spelling, begins[:-1], codes)}
    return Columns(
        codes={name: columns[name] for name in COLUMNS},
        values=tuple(codes),
        window=np.repeat(np.arange(len(lengths)), lengths),
        usable=~spelling.special[spelling.word],
        n_windows=len(lengths),
    )


def _spell(token: Int[np.ndarray, " token"], window_begins: Bool[np.ndarray, " token"], codes: _Codes) -> _Spelling:
    """Group tokens into words.

    Args:
        token: Code of each token's text; only these codes are given so far.
        window_begins: The first token of each window.
    """
    shapes = [_shape(text) for text in codes]
    head, tail, spaced = (
        np.array([getattr(shape, name) for shape in shapes], dtype=np.int64)[token]
        for name in ("head", "tail", "spaced")
    )
    before = np.roll(tail, 1)
    begins = window_begins | (spaced > 0) | (head != before) | (before >= _ALONE)
    starts = np.flatnonzero(begins)
    word = np.cumsum(begins) - 1
    prefix = codes.of(_decoded(shape.core) for shape in shapes)[token]
    word_code = prefix[starts]
    stops = np.append(starts[1:], len(token))
    known: dict[tuple[int, ...], list[int]] = {}
    for number in np.flatnonzero(stops - starts > 1).tolist():
        start, stop = starts[number], stops[number]
        pieces = tuple(token[start:stop].tolist())
        if pieces not in known:
            cores = accumulate(shapes[piece].core for piece in pieces)
            known[pieces] = [codes[_decoded(core)] for core in cores]
        prefix[start:stop] = known[pieces]
        word_code[number] = known[pieces][-1]
    cut = window_begins[starts] & (spaced[starts] == 0) & (head[starts] < _ALONE)
    return _Spelling(starts, word, word_code, prefix, head[starts] == _SPECIAL_CLASS, cut)


def _within_words(spelling: _Spelling, codes: _Codes) -> dict[str, Int[np.ndarray, " token"]]:
    """The columns that depend on the word alone: prefix, word, kind, piece, nth."""
    word = spelling.word
    length = np.bincount(word, minlength=len(spelling.starts))[word]
    nth = np.arange(len(word)) - spelling.starts[word] + 1
    whole, first, middle, last = codes.of(("whole", "first", "middle", "last"))
    piece = np.where(nth == 1, np.where(length == 1, whole, first), np.where(nth == length, last, middle))
    numbers = np.array([_UNKNOWN, *_numbers(codes), _UNKNOWN])
    prefixes, place = np.unique(spelling.prefix, return_inverse=True)
    strings = list(codes)
    kind = codes.of(kind_of(strings[prefix]) for prefix in prefixes.tolist())[place]
    cut = spelling.cut[word]
    return {
        "kind": kind,
        "prefix": np.where(cut, _UNKNOWN, spelling.prefix),
        "word": np.where(cut, _UNKNOWN, spelling.word_code[word]),
        "piece": np.where(cut, _UNKNOWN, piece),
        "nth": np.where(cut, _UNKNOWN, numbers[np.minimum(nth, _NUMBERED + 1)]),
    }


def _around_words(
    spelling: _Spelling, window_begins: Bool[np.ndarray, " token"], codes: _Codes
) -> dict[str, Int[np.ndarray, " token"]]:
    """The columns that depend on the text before: back1, back2, back3, place, again."""
    word, special = spelling.word, spelling.special
    begins = special | window_begins[spelling.starts]
    text = np.cumsum(begins) - 1
    # A special token stands for the start of the text that it opens.
    code = np.where(special, codes[TEXT_START], np.where(spelling.cut, _UNKNOWN, spelling.word_code))
    columns = {}
    for distance in (1, 2, 3):
        here = np.full(len(code), _UNKNOWN)
        same = text[distance:] == text[:-distance]
        here[distance:][same] = code[:-distance][same]
        columns[f"back{distance}"] = here[word]
    opening = np.flatnonzero(begins)[text]
    place = np.where(special[opening], np.arange(len(text)) - opening, 0)
    numbers = np.array([_UNKNOWN, *_numbers(codes), _UNKNOWN])
    new, repeated = codes.of(("new", "repeated"))
    _, first, which = np.unique((text[word] << 32) | spelling.prefix, return_index=True, return_inverse=True)
    again = np.where(first[which] == np.arange(len(word)), new, repeated)
    return columns | {
        "place": numbers[np.minimum(place, _NUMBERED + 1)][word],
        "again": np.where(spelling.cut[word], _UNKNOWN, again),
    }


def _numbers(codes: _Codes) -> list[int]:
    return [codes[str(number)] for number in range(1, _NUMBERED + 1)]


def _decoded(text: str) -> str:
    """The characters that tokens like `<0xC3>`, `<0xA9>` make up together."""
    return _BYTES.sub(_characters, text) if "<0x" in text else text


def _characters(match: re.Match) -> str:
    return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace")
