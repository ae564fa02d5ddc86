"""Put rules into words."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from circuitmill.autointerp.rules import Clause
from circuitmill.autointerp.search import Evidence, Found
from circuitmill.autointerp.words import TEXT_START, Columns, kind_of

_SHARED = 0.9
"""Share of a word's occurrences, or of a clause's activation, from which on something is said of all."""
_FULL = 0.8
"""A rule that covers less of the activation than this says so."""

_PLURALS = {
    "capitalised word": "capitalised words",
    "lowercase word": "lowercase words",
    "word in capitals": "words in capitals",
    "number": "numbers",
    "ideograph": "ideographs",
    "line break": "line breaks",
    "space": "spaces",
}
_ORDINALS = {"1": "first", "2": "second", "3": "third", "4": "fourth", "5": "fifth"}
_AGAIN = {"repeated": "repeated", "new": "first-time"}
_NAMED = ("prefix", "word", "token")
_AFTER = {
    ("back1",): ("the word after", "after"),
    ("back2",): ("the second word after", "two words after"),
    ("back3",): ("the third word after", "three words after"),
    ("back2", "back1"): ("the word after", "after"),
    ("back3", "back2"): ("the second word after", "two words after"),
}
"""Columns of the context -> how it is written with any word and with a word that is named."""


def describe(found: Found, evidence: Evidence, max_listed: int) -> str:
    """What a rule says, as the end of a sentence that begins with "fires on".

    Args:
        max_listed: Words listed before "+N more", per clause.
    """
    parts = [_clause(clause, evidence, max_listed) for clause in found.rule.clauses]
    coverage = f" (covers {found.covers:.0%} of its activation)" if found.covers < _FULL else ""
    return "; also on ".join(parts) + coverage


def top_words(evidence: Evidence, limit: int) -> tuple[str, ...]:
    """The whole words a feature fires on, those with most activation first."""
    weights: dict[str, float] = defaultdict(float)
    for token in np.flatnonzero(evidence.fires):
        weights[evidence.columns.value("word", int(token))] += evidence.weight[token]
    # A word that the window cuts off is not known.
    words = sorted(weights.keys() - {""}, key=lambda word: (-weights[word], word))[:limit]
    return tuple(full_name(evidence.columns, word) for word in words)


def full_name(columns: Columns, word: str) -> str:
    """A capitalised word with the capitalised words that always stand before it: "Paso" becomes "El Paso"."""
    name = word
    if not kind_of(word).startswith("capital"):
        return name
    here = (columns.codes["word"] == columns.code(word)) & (columns.codes["nth"] == columns.code("1"))
    for column in ("back1", "back2"):
        before = columns.codes[column][here]
        before = before[before >= 0]
        # One sighting does not show that two words belong together.
        if len(before) < 2:
            break
        values, counts = np.unique(before, return_counts=True)
        most = columns.values[values[np.argmax(counts)]]
        if counts.max() < _SHARED * len(before) or not most or not kind_of(most).startswith("capital"):
            break
        name = f"{most} {name}"
    return name


def listing(items: Sequence[str], limit: int) -> str:
    """Items with commas, and how many were left out.

    Example:
        >>> listing(["a", "b", "c"], 2)
        'a, b, +1 more'
    """
    return ", ".join([*items[:limit], *([f"+{len(items) - limit} more"] if len(items) > limit else [])])


def _clause(clause: Clause, evidence: Evidence, max_listed: int) -> str:
    columns, tokens = evidence.columns, np.flatnonzero(clause.holds(evidence.columns) & evidence.fires)
    members: dict[tuple[str, ...], list[int]] = {key: [] for key in clause.keys}
    for token in tokens.tolist():
        members[tuple(columns.value(name, token) for name in clause.columns)].append(token)
    weights = {key: float(evidence.weight[where].sum()) for key, where in members.items()}
    keys = sorted(clause.keys, key=lambda key: -weights[key])
    context = tuple(name for name in clause.columns if name.startswith("back"))
    targets: dict[str, list[str]] = {}
    for key in keys:
        values = dict(zip(clause.columns, key, strict=True))
        target = _target(values, columns, np.array(members[key], dtype=np.int64))
        targets.setdefault(target, []).append(_context([values[name] for name in context]))
    text = _join(targets, context, max_listed)
    return text + _piece(evidence, tokens) if set(_NAMED[:2]) & set(clause.columns) else text


def _join(targets: dict[str, list[str]], context: tuple[str, ...], limit: int) -> str:
    """Targets with their contexts, said once if all share it."""
    if not context:
        return listing(list(targets), limit)
    any_word, named = _AFTER[context]
    after = {target: (named if target else any_word) for target in targets}
    contexts = {tuple(names) for names in targets.values()}
    if len(contexts) == 1:
        shared = listing(next(iter(targets.values())), limit)
        return f"{listing(list(targets), limit)} {after[next(iter(targets))]} {shared}".strip()
    if all(len(names) == 1 for names in targets.values()):
        return listing([f"{target} {after[target]} {names[0]}" for target, names in targets.items()], limit)
    parts = [f"{target} {after[target]} {listing(names, limit)}".strip() for target, names in targets.items()]
    return "; ".join(parts[:limit]) + (f"; +{len(parts) - limit} more" if len(parts) > limit else "")


def _target(values: dict[str, str], columns: Columns, tokens: Int[np.ndarray, " item"]) -> str:
    """The part of a key that says which token fires; empty if any does."""
    again = f"{_AGAIN[values['again']]} " if "again" in values else ""
    for name in _NAMED:
        if name in values:
            return f'{again}"{_name(name, values[name], columns, tokens)}"'
    if "kind" in values:
        thing = again + _PLURALS.get(values["kind"], values["kind"])
    elif "place" in values:
        thing = f"the {_ORDINALS[values['place']]} word of a text"
    elif again:
        thing = f"{again}words"
    else:
        thing = ""
    part = values.get("piece", "") or _ORDINALS.get(values.get("nth", ""), "")
    if part == "whole":
        return f"{thing or 'the word'} in one piece"
    return f"the {part} piece of {thing or 'the word'}" if part else thing


def _name(column: str, value: str, columns: Columns, tokens: Int[np.ndarray, " item"]) -> str:
    """The whole word for the beginning of one, if there is only one such word."""
    if column == "token" or not len(tokens):
        return value
    words, counts = np.unique(columns.codes["word"][tokens], return_counts=True)
    if words[np.argmax(counts)] < 0 or counts.max() < _SHARED * len(tokens):
        return f"{value}…"
    return full_name(columns, columns.values[words[np.argmax(counts)]])


def _context(words: Sequence[str]) -> str:
    if not words:
        return ""
    if len(words) == 2 and words[0] == TEXT_START:
        return f'an opening "{words[1]}"'
    return "the start of a text" if words[-1] == TEXT_START else f'"{" ".join(words)}"'


def _piece(evidence: Evidence, tokens: Int[np.ndarray, " item"]) -> str:
    """Which piece of its words a clause is on, if they have several and it is always the same one."""
    total = evidence.weight[tokens].sum()
    several = 0.0
    shares = {}
    for piece in ("first", "middle", "last"):
        is_piece: Bool[np.ndarray, " item"] = evidence.columns.codes["piece"][tokens] == evidence.columns.code(piece)
        shares[piece] = float(evidence.weight[tokens][is_piece].sum())
        several += shares[piece]
    best = max(shares, key=lambda piece: shares[piece])
    return f" ({best} piece)" if several > 0.3 * total and shares[best] >= _SHARED * several else ""
