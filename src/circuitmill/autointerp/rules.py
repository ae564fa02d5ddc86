"""Rules: explanations that a program can apply.

A rule is a list of clauses joined by "or". A clause names columns (see `words.py`) and a set of keys, one
string per column: it holds at a token whose columns read one of the keys.

    {"format": 1, "clauses": [{"columns": ["back1", "prefix"], "keys": [["capital", "of"]]}]}

says: fires on "of" after "capital".
"""

import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from circuitmill.autointerp.words import COLUMNS, Columns
from circuitmill.errors import ClientError

FORMAT = 1
_BITS = 21
_MAX_COLUMNS = 3


def keys_at(columns: Columns, names: tuple[str, ...]) -> Int[np.ndarray, " token"]:
    """One number per token for up to three columns together; negative if one of them is not known."""
    combined = columns.codes[names[0]]
    for name in names[1:]:
        codes = columns.codes[name]
        combined = np.where((combined < 0) | (codes < 0), -1, (combined << _BITS) | codes)
    return combined


@dataclass(frozen=True)
class Clause:
    """Tokens whose columns read one of the keys."""

    columns: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]

    def holds(self, columns: Columns) -> Bool[np.ndarray, " token"]:
        """Where the clause holds."""
        wanted = []
        for key in self.keys:
            codes = [columns.code(part) for part in key]
            if min(codes) >= 0:
                combined = codes[0]
                for code in codes[1:]:
                    combined = (combined << _BITS) | code
                wanted.append(combined)
        found = keys_at(columns, self.columns)
        return np.isin(found, np.array(wanted, dtype=np.int64)) & columns.usable


@dataclass(frozen=True)
class Rule:
    """Tokens at which any of the clauses holds."""

    clauses: tuple[Clause, ...]

    def fires(self, columns: Columns) -> Bool[np.ndarray, " token"]:
        """Where the rule says that the feature fires."""
        fires = np.zeros(len(columns.window), dtype=bool)
        for clause in self.clauses:
            fires |= clause.holds(columns)
        return fires

    def to_json(self) -> str:
        """The rule as one line of text."""
        clauses = [{"columns": clause.columns, "keys": clause.keys} for clause in self.clauses]
        return json.dumps({"format": FORMAT, "clauses": clauses}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Rule":
        """Read a rule back.

        Raises:
            ClientError: not a rule, or one of another format.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise _refuse(f"a rule of format {FORMAT}", f"format {raw['format']}", text)
            clauses = tuple(
                Clause(tuple(clause["columns"]), tuple(tuple(map(str, key)) for key in clause["keys"]))
                for clause in raw["clauses"]
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _refuse("a rule in JSON", f"{type(error).__name__}: {error}", text) from error
        for clause in clauses:
            if not 0 < len(clause.columns) <= _MAX_COLUMNS or not set(clause.columns) <= set(COLUMNS):
                raise _refuse("up to three of " + ", ".join(COLUMNS), ", ".join(clause.columns) or "none", text)
            if any(len(key) != len(clause.columns) for key in clause.keys):
                raise _refuse("one string per column in each key", "another number", text)
        return cls(clauses)


def _refuse(expected: str, found: str, text: str) -> ClientError:
    return ClientError(
        expected, found=found, where=f"rule {text[:80]}", fix="run stage interpret again: it writes the rules"
    )
