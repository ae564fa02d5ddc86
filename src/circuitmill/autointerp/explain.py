"""Explain features without a language model: by what they fire on and what they promote.

1. The train windows give the rule that best tells the firing tokens from all others (`search.py`).
2. The rule is put into words: `fires on "Dallas", "Houston", "El Paso" (last piece)`.
3. Tokens whose logits the feature raises far above the rest are added: `promotes " Texas"`.

A feature that never fires, or hardly ever, is said to do so: an explanation is not invented for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from circuitmill.autointerp.examples import Examples, Logit, Window
from circuitmill.autointerp.phrases import describe, top_words
from circuitmill.autointerp.search import Evidence, SearchOptions, find_rule
from circuitmill.autointerp.words import columns_of


@dataclass(frozen=True)
class Explanation:
    """What a feature is said to do."""

    text: str
    """One line."""
    explainer: str
    """Name of the explainer that wrote it."""
    rule: str | None = None
    """The same for a program (`rules.Rule` in JSON); None where there is nothing to apply."""
    words: tuple[str, ...] = ()
    """Whole words it fires on, by activation."""
    promotes: tuple[str, ...] = ()
    """Tokens whose logits it raises far above those of the others."""


@runtime_checkable
class Explainer(Protocol):
    """Anything that explains a feature from its examples."""

    @property
    def name(self) -> str:
        """Written beside every explanation."""
        ...

    def explain(self, examples: Examples) -> Explanation:
        """Explain one feature from its train windows and logits."""
        ...


@dataclass(frozen=True)
class TokenExplainer:
    """Explains by the tokens a feature fires on, against those where it does not."""

    search: SearchOptions
    n_tokens: int
    """Tokens over which the features were collected, for the text about features that never fire."""
    min_windows: int
    """Firing train windows below which nothing is said."""
    max_listed: int
    """Words listed in the text before "+N more"."""
    max_words: int
    """Words kept beside the text."""
    max_promoted: int
    """Promoted tokens named."""
    min_separation: float
    """How far a promoted token's logit must lie above the others (see `promoted`)."""
    name: str = "tokens"

    def explain(self, examples: Examples) -> Explanation:
        """Explain one feature from its train windows and logits."""
        if examples.n_active == 0:
            return Explanation(f"dead: never fires in {self.n_tokens:,} tokens", self.name)
        promotes = promoted(examples.top_logits, examples.bottom_logits, self.min_separation, self.max_promoted)
        ending = "; promotes " + ", ".join(f'"{text}"' for text in promotes) if promotes else ""
        firing = sum(window.fires for window in examples.train)
        if firing < self.min_windows:
            text = f"rare: fires on {examples.n_active:,} of {self.n_tokens:,} tokens, too few to explain"
            return Explanation(text + ending, self.name, promotes=promotes)
        evidence = evidence_of(examples.train)
        found = find_rule(evidence, self.search)
        if found.rule.clauses:
            text, rule = f"fires on {describe(found, evidence, self.max_listed)}", found.rule.to_json()
        else:
            text, rule = f"no pattern in {firing} firing windows", None
        return Explanation(text + ending, self.name, rule, top_words(evidence, self.max_words), promotes)


def evidence_of(windows: Sequence[Window]) -> Evidence:
    """The tokens of some windows with the weight each has in the search.

    A firing token weighs half of what all do and half by its activation over the mean: the strong ones matter
    more, the weak ones are not given up, as they count the same when the explanation is scored.
    """
    activations = np.concatenate([window.activations for window in windows]).astype(np.float64)
    fires = activations > 0
    mean = activations[fires].mean() if fires.any() else 1.0
    weight = np.where(fires, 0.5 + 0.5 * activations / mean, 0.0)
    return Evidence(columns_of(window.texts for window in windows), weight)


def promoted(top: Sequence[Logit], bottom: Sequence[Logit], min_separation: float, limit: int) -> tuple[str, ...]:
    """The tokens whose logits stand out, largest first.

    z = (v - m) / s with m the mean and s the standard deviation of a background: the lower half of the
    largest logits or the less extreme half of the smallest ones, mirrored; the calmer of the two. Both lists
    are tails of what the feature does to all tokens, so a feature that promotes nothing in particular has
    them alike. As the spread inside a tail is small, s is at least m / 6: z >= 3 then means half as much
    again as the background.

    Example:
        >>> tops = [Logit(" Texas", 9.0), Logit(" a", 2.1), Logit(" b", 2.0), Logit(" c", 1.9)]
        >>> promoted(tops, [Logit(" d", -2.2), Logit(" e", -2.0)], min_separation=3.0, limit=5)
        (' Texas',)
    """
    values = np.array([logit.value for logit in top], dtype=np.float64)
    mirrored = -np.array([logit.value for logit in bottom], dtype=np.float64)
    backgrounds = [half for half in (values[len(values) // 2 :], mirrored[len(mirrored) // 2 :]) if len(half)]
    if not backgrounds:
        return ()
    mean, deviation = min((float(half.mean()), float(half.std())) for half in backgrounds)
    scores = _separation(values, max(mean, 0.0), deviation)
    return tuple(logit.text for logit, z in zip(top, scores, strict=True) if z >= min_separation)[:limit]


def _separation(values: Float[np.ndarray, " item"], mean: float, deviation: float) -> Float[np.ndarray, " item"]:
    spread = max(deviation, mean / 6)
    if spread == 0:
        return np.where(values > mean, np.inf, 0.0)
    return (values - mean) / spread
