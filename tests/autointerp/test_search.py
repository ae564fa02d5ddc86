"""The search against trying all sets of keys."""

from itertools import chain, combinations

import numpy as np
import pytest

from circuitmill.autointerp import search
from circuitmill.autointerp.rules import keys_at
from circuitmill.autointerp.search import Evidence, SearchOptions, find_rule
from circuitmill.autointerp.words import columns_of

OPTIONS = SearchOptions(cost=1.0, max_clauses=1, min_gain=0.02)


def random_evidence(seed: int) -> Evidence:
    rng = np.random.default_rng(seed)
    texts = [[" " + str(word) for word in rng.choice(["a", "b", "c", "d", "e", "f"], size=12)] for _ in range(5)]
    likely = dict(zip("abcdef", rng.random(6), strict=True))
    fires = np.array([rng.random() < likely[word.strip()] for window in texts for word in window])
    return Evidence(columns_of(texts), np.where(fires, rng.uniform(0.5, 2.0, len(fires)), 0.0))


def worth(evidence: Evidence, chosen: np.ndarray, n_keys: int, cost: float) -> float:
    hit = evidence.weight[chosen].sum()
    alarm = (chosen & ~evidence.fires).sum() + cost * n_keys
    return 2 * hit / (hit + evidence.weight.sum() + alarm)


@pytest.mark.parametrize("seed", range(10))
def test_the_best_set_of_a_family_is_found(seed, monkeypatch):
    monkeypatch.setattr(search, "FAMILIES", (("prefix",),))
    evidence = random_evidence(seed)
    keys = keys_at(evidence.columns, ("prefix",))
    values = np.unique(keys)
    sets = chain.from_iterable(combinations(values, size) for size in range(1, len(values) + 1))
    best = max(worth(evidence, np.isin(keys, chosen), len(chosen), OPTIONS.cost) for chosen in sets)
    found = find_rule(evidence, OPTIONS)
    assert found.score == pytest.approx(best, abs=1e-12)
    covered = found.rule.fires(evidence.columns)
    assert worth(evidence, covered, len(found.rule.clauses[0].keys), OPTIONS.cost) == pytest.approx(best, abs=1e-12)
    assert found.covers == pytest.approx(evidence.weight[covered].sum() / evidence.weight.sum())


@pytest.mark.parametrize("seed", range(5))
def test_every_further_clause_brings_the_gain(seed):
    evidence = random_evidence(seed)
    scores = [find_rule(evidence, SearchOptions(0.5, most, 0.02)).score for most in (1, 2, 3)]
    counts = [len(find_rule(evidence, SearchOptions(0.5, most, 0.02)).rule.clauses) for most in (1, 2, 3)]
    assert scores == sorted(scores)
    assert all(
        after >= before + 0.02
        for before, after, more in zip(scores[:-1], scores[1:], np.diff(counts), strict=True)
        if more
    )


def test_a_dearer_key_makes_shorter_rules():
    evidence = random_evidence(3)
    sizes = [
        sum(len(clause.keys) for clause in find_rule(evidence, SearchOptions(cost, 3, 0.02)).rule.clauses)
        for cost in (0.0, 2.0, 20.0)
    ]
    assert sizes[0] > sizes[1] >= sizes[2] == 1


def test_a_feature_that_does_not_fire_has_an_empty_rule():
    columns = columns_of([[" a", " b"]])
    found = find_rule(Evidence(columns, np.zeros(2)), OPTIONS)
    assert (found.rule.clauses, found.score, found.covers) == ((), 0.0, 0.0)
