"""Find the rule that best tells where a feature fires from where it does not.

The evidence is every token of the train windows: those at which the feature fires, weighted by activation,
against the silent windows and the other tokens of the firing windows. A family of predicates (all tokens, all
words, all pairs of a word and the one before, all kinds of word, ...) divides the tokens by a key. A set S of
keys is worth

    F(S) = 2 TP / (2 TP + FP + FN + cost |S|)

the F1 score over tokens with every key counted as `cost` more false alarms, so that a long list of words seen
once loses to a short description and an n-gram is named only where its last word is not enough. As F is a
ratio of sums over keys, the best set of a family is found exactly: sort the keys by TP / (FP + cost) and take
the best prefix. The family with the largest F wins; then another one is added for the tokens left over as
long as F rises by `min_gain`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from circuitmill.autointerp.rules import Clause, Rule, keys_at
from circuitmill.autointerp.words import Columns

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("prefix",),
    ("word",),
    ("token",),
    ("kind",),
    ("kind", "piece"),
    ("kind", "nth"),
    ("back1",),
    ("back1", "piece"),
    ("back2",),
    ("back2", "piece"),
    ("back3",),
    ("back3", "piece"),
    ("place",),
    ("place", "piece"),
    ("again",),
    ("again", "kind"),
    ("back1", "kind"),
    ("back2", "kind"),
    ("back1", "prefix"),
    ("back2", "prefix"),
    ("back3", "prefix"),
    ("again", "prefix"),
    ("back2", "back1"),
    ("back2", "back1", "piece"),
    ("back2", "back1", "prefix"),
)
"""What a clause may look at, simplest first: of two families that do equally well the first is taken."""


@dataclass(frozen=True)
class Evidence:
    """Tokens and how strongly the feature fires at each."""

    columns: Columns
    weight: Float[np.ndarray, " token"]
    """Activation over the mean of the firing tokens; 0 where the feature is silent."""

    @property
    def fires(self) -> Bool[np.ndarray, " token"]:
        """Where the feature fires."""
        return self.weight > 0


@dataclass(frozen=True)
class SearchOptions:
    """How the rule is looked for."""

    cost: float
    """False alarms that one more key in the rule is worth; (k + 1) / 2 times as many if it has k columns."""
    max_clauses: int
    """Largest number of clauses."""
    min_gain: float
    """Rise in F that a further clause must bring."""


@dataclass(frozen=True)
class Found:
    """A rule with how well it does on the evidence."""

    rule: Rule
    score: float
    """F of the module docstring, 0 to 1."""
    covers: float
    """Share of the activation that falls on tokens where the rule holds."""


@dataclass(frozen=True)
class _Best:
    family: tuple[str, ...]
    keys: Int[np.ndarray, " item"]
    score: float
    hit: float
    alarm: float


def find_rule(evidence: Evidence, options: SearchOptions) -> Found:
    """The best rule for the evidence; one without clauses if the feature does not fire in it."""
    total = float(evidence.weight.sum())
    open_tokens = evidence.columns.usable.copy()
    clauses: list[Clause] = []
    score = hit = alarm = 0.0
    while total > 0 and len(clauses) < options.max_clauses:
        candidates = [
            _best_keys(evidence, family, open_tokens, (hit, alarm, total), options.cost)
            for family in FAMILIES
        ]
        best = max((one for one in candidates if one is not None), key=lambda one: one.score, default=None)
        if best is None or best.score < score + options.min_gain:
            break
        score, hit, alarm = best.score, best.hit, best.alarm
        found = keys_at(evidence.columns, best.family)
        clauses.append(
            Clause(
                best.family, tuple(_strings(evidence.columns, found, key, best.family) for key in best.keys)
            )
        )
        open_tokens &= ~np.isin(found, best.keys)
    return Found(Rule(tuple(clauses)), score, hit / total if total else 0.0)


def _best_keys(
    evidence: Evidence,
    family: tuple[str, ...],
    open_tokens: Bool[np.ndarray, " token"],
    so_far: tuple[float, float, float],
    cost: float,
) -> _Best | None:
    keys = keys_at(evidence.columns, family)
    open_tokens = open_tokens & (keys >= 0)
    firing = np.flatnonzero(open_tokens & evidence.fires)
    if not len(firing):
        return None
    values, first, inverse = np.unique(keys[firing], return_index=True, return_inverse=True)
    hits = np.bincount(inverse, weights=evidence.weight[firing])
    silent = keys[open_tokens & ~evidence.fires]
    slot = np.minimum(np.searchsorted(values, silent), len(values) - 1)
    alarms = np.bincount(slot[values[slot] == silent], minlength=len(values)) + cost * (len(family) + 1) / 2
    # Ties are broken by where a key occurs first: codes depend on the order of the text only.
    order = np.lexsort((first, -hits, -hits / alarms))
    hit, alarm, total = so_far
    hit_sum, alarm_sum = hit + np.cumsum(hits[order]), alarm + np.cumsum(alarms[order])
    scores = 2 * hit_sum / (hit_sum + total + alarm_sum)
    stop = int(np.argmax(scores))
    return _Best(
        family, values[order[: stop + 1]], float(scores[stop]), float(hit_sum[stop]), float(alarm_sum[stop])
    )


def _strings(
    columns: Columns, found: Int[np.ndarray, " token"], key: np.integer, family: tuple[str, ...]
) -> tuple[str, ...]:
    token = int(np.argmax(found == key))
    return tuple(columns.value(name, token) for name in family)
