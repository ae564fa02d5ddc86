"""Find the rule that best tells where a feature fires from where it does not.

The evidence is every token of the train windows: those at which the feature fires, weighted by activation,
against the silent windows and the other tokens of the firing windows. A family of predicates (all tokens, all
words, all pairs of a word and the one before, all kinds of word, ...) divides the tokens by a key. A set S of
keys is worth

    F(S) = 2 TP / (2 TP + FP + FN + cost |S|)

the F1 score over tokens with every key counted as `cost` more false alarms, so that a long list of words seen
once loses to a short description and an n-gram is named only where its last word is not enough. As F is a
ratio of sums over keys, the best set of a family is found exactly: sort the keys by TP / (TP + FP + cost) and take
the best prefix. The family with the largest F wins; then another one is added for the tokens left over as
long as F rises by `min_gain`. The same is tried from the best single key, and the better of the two rules is
kept.
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
    ("back3", "back2"),
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
class _Choice:
    """A clause in the making."""

    family: tuple[str, ...]
    keys: Int[np.ndarray, " item"]


@dataclass(frozen=True)
class _State:
    """A rule in the making."""

    choices: tuple[_Choice, ...]
    hit: float
    """Weight of the firing tokens that are covered."""
    alarm: float
    """Silent tokens that are covered, and the cost of the keys."""
    score: float


class _Search:
    """Extends rules on one body of evidence."""

    def __init__(self, evidence: Evidence, options: SearchOptions) -> None:
        self.evidence, self.options = evidence, options
        self.total = float(evidence.weight.sum())
        self.keys = {family: keys_at(evidence.columns, family) for family in FAMILIES}

    def extended(self, state: _State, *, single: bool = False) -> _State | None:
        """The rule with the best further clause of all families; None if nothing is left to cover.

        Args:
            single: Only clauses with one key.
        """
        left = self.evidence.columns.usable.copy()
        for choice in state.choices:
            left &= ~np.isin(self.keys[choice.family], choice.keys)
        firing = np.flatnonzero(left & self.evidence.fires)
        silent = np.flatnonzero(left & ~self.evidence.fires)
        weight = self.evidence.weight[firing]
        found = (
            self._with_family(family, keys[firing], weight, keys[silent], state, single)
            for family, keys in self.keys.items()
        )
        return max((one for one in found if one is not None), key=lambda one: one.score, default=None)

    def completed(self, state: _State) -> _State:
        """Add the best clause after the other while each brings `min_gain`."""
        while len(state.choices) < self.options.max_clauses:
            wanted = state.score + self.options.min_gain
            # Not even a clause that finds all the rest without an alarm would do.
            if 2 * self.total / (2 * self.total + state.alarm + self.options.cost) < wanted:
                break
            extended = self.extended(state)
            if extended is None or extended.score < wanted:
                break
            state = extended
        return state

    def _with_family(
        self,
        family: tuple[str, ...],
        firing: Int[np.ndarray, " item"],
        weight: Float[np.ndarray, " item"],
        silent: Int[np.ndarray, " token"],
        state: _State,
        single: bool,
    ) -> _State | None:
        values, first, inverse = np.unique(firing, return_index=True, return_inverse=True)
        if not len(values) or values[-1] < 0:
            return None
        hits = np.bincount(inverse, weights=weight)
        slot = np.minimum(np.searchsorted(values, silent), len(values) - 1)
        alarms = np.bincount(slot[values[slot] == silent], minlength=len(values)).astype(np.float64)
        alarms += self.options.cost * (len(family) + 1) / 2
        # Values that are not known are no keys. They sort first.
        known = slice(int(np.searchsorted(values, 0)), None)
        values, first, hits, alarms = values[known], first[known], hits[known], alarms[known]
        if single:
            best = np.lexsort((first, -hits / (hits + alarms + self.total)))[:1]
            values, first, hits, alarms = values[best], first[best], hits[best], alarms[best]
        # Ties are broken by where a key occurs first: it depends on the text alone, as codes do not.
        order = np.lexsort((first, -hits, -hits / (hits + alarms)))
        hit, alarm = state.hit + np.cumsum(hits[order]), state.alarm + np.cumsum(alarms[order])
        scores = 2 * hit / (hit + self.total + alarm)
        last = int(np.argmax(scores))
        return _State(
            choices=(*state.choices, _Choice(family, values[order[: last + 1]])),
            hit=float(hit[last]),
            alarm=float(alarm[last]),
            score=float(scores[last]),
        )


def find_rule(evidence: Evidence, options: SearchOptions) -> Found:
    """The best rule for the evidence; one without clauses if the feature does not fire in it."""
    best = start = _State((), 0.0, 0.0, 0.0)
    if evidence.fires.any():
        search = _Search(evidence, options)
        # The clause that is best alone is not always the best to begin with: a short one leaves room for another.
        for seed in (search.extended(start), search.extended(start, single=True)):
            if seed is not None:
                best = max(best, search.completed(seed), key=lambda state: state.score)
    clauses = (
        Clause(choice.family, tuple(_strings(evidence.columns, choice.family, key) for key in choice.keys))
        for choice in best.choices
    )
    total = float(evidence.weight.sum())
    return Found(Rule(tuple(clauses)), best.score, best.hit / total if total else 0.0)


def _strings(columns: Columns, family: tuple[str, ...], key: np.integer) -> tuple[str, ...]:
    token = int(np.argmax(keys_at(columns, family) == key))
    return tuple(columns.value(name, token) for name in family)
