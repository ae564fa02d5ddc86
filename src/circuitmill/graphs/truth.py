"""Whether a graph passes through the concepts that are known to lie between its prompt and its answer.

The embedded model answers questions whose intermediate concepts we chose: the state between a city and a
capital. A concept counts as found if a feature of the pruned graph names it, in its explanation or among the
tokens it promotes most. It is judged by whole words with their capitals, never by parts of words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.graphs import read_json

FORMAT = 1


@dataclass(frozen=True)
class Concept:
    """Something the model must work out on the way."""

    name: str
    words: tuple[str, ...]
    """Any of these names it."""
    after: str
    """The part of the prompt at whose last token it is expected."""


@dataclass(frozen=True)
class Circuit:
    """A prompt with a known answer and known steps."""

    prompt: str
    answers: tuple[str, ...]
    """Any of these is a right continuation, or the beginning of one; the first is the one to show."""
    concepts: tuple[Concept, ...]


@dataclass(frozen=True)
class Named:
    """What is said about a feature."""

    explanation: str
    top_logits: tuple[str, ...]
    """Texts of the tokens it promotes, the most promoted first."""


def load_circuits(path: Path) -> dict[str, tuple[Circuit, ...]]:
    """The circuits of truth.json, by kind.

    Raises:
        StoreError: the file is missing, damaged or of another format.
    """
    raw = read_json(path)
    try:
        if raw["format"] != FORMAT:
            raise StoreError(f"format {FORMAT}", found=raw["format"], where=path, fix="rerun stage toyworld")
        return {
            kind: tuple(
                Circuit(
                    item["prompt"],
                    tuple(item.get("answers", [item["answer"]])),
                    tuple(
                        Concept(concept["name"], tuple(concept["words"]), concept["after"])
                        for concept in item["concepts"]
                    ),
                )
                for item in items
            )
            for kind, items in raw["circuits"].items()
        }
    except (KeyError, TypeError) as error:
        raise StoreError(
            "circuits with prompt, answer and concepts",
            found=f"{error!r}",
            where=path,
            fix="rerun stage toyworld",
        ) from error


def find_circuit(circuits: Mapping[str, Sequence[Circuit]], kind: str, index: int) -> Circuit:
    """One circuit.

    Raises:
        ConfigError: no circuit of this kind, or fewer of them.
    """
    known = circuits.get(kind)
    if known is None or index >= len(known):
        raise ConfigError(
            f"at most {len(known)} circuits" if known else "a kind of circuit among " + ", ".join(sorted(circuits)),
            found=str(index + 1) if known else kind,
            where=f"attribute.circuits.{kind}",
            fix="ask for a circuit that truth.json holds",
        )
    return known[index]


def names(concept: Concept, named: Named) -> str | None:
    """How a feature names a concept: "explanation", "top_logits", or not at all.

    >>> texas = Concept("Texas", ("Texas",), "Dallas")
    >>> names(texas, Named("fires on Dallas, promotes Texas", ()))
    'explanation'
    >>> names(texas, Named("fires on Texastown", (" Texas",)))
    'top_logits'
    >>> names(texas, Named("fires on texas", (" Texan",)))
    """
    for word in concept.words:
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", named.explanation):
            return "explanation"
    texts = {text.strip() for text in named.top_logits}
    return "top_logits" if texts & {word.strip() for word in concept.words} else None


def check_concept(
    concept: Concept,
    position: int,
    features: Sequence[Mapping[str, Any]],
    named: Mapping[tuple[int, int], Named],
) -> dict[str, Any]:
    """Look for a concept among the feature nodes of a pruned graph.

    Args:
        position: Where the concept is expected.
        features: The graph's feature nodes, as `stores.graphs.graph_features` gives them.
        named: By layer and feature, for every feature among them.

    Returns:
        Whether and how it was found; `best` is the most influential feature that names it, one at the
        expected position before any other.
    """
    matches = [
        {**node, "evidence": evidence}
        for node in features
        if (evidence := names(concept, named[node["layer"], node["feature"]]))
    ]
    matches.sort(key=lambda match: (match["pos"] != position, match["influence"], match["layer"], match["feature"]))
    best = None
    if matches:
        first = matches[0]
        best = {key: first[key] for key in ("layer", "pos", "feature", "influence", "evidence")}
        best["explanation"] = named[first["layer"], first["feature"]].explanation
        best["top_logits"] = list(named[first["layer"], first["feature"]].top_logits)
    return {
        "name": concept.name,
        "expected_pos": position,
        "found": bool(matches),
        "at_expected_pos": bool(matches) and matches[0]["pos"] == position,
        "n_features": len(matches),
        "best": best,
    }
