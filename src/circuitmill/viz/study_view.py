"""The study as a table, the same one on the page and in a terminal."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from circuitmill.viz.formatting import Real, number, size

Cell = tuple[str, str]
"""What a cell says, and what stands smaller below or after it."""

FIGURES = {"ev": "EV", "l0": "L0", "kl": "KL", "replacement_score": "Replacement score"}
"""Figure -> head of its column."""
OVERLAPS: dict[str, Cell] = {
    "by_id": ("Same nodes", "same seed"),
    "matched": ("Matched nodes", "same seed"),
    "matched_other_seed": ("Matched nodes", "other seed"),
}
"""Kind of overlap -> head of its column."""
WIDTH = 120
"""Characters in a line of the notes in a terminal."""


def title(study: Mapping[str, Any]) -> str:
    """The heading: what variants differ in."""
    return f"Study: {', '.join(study['keys'])}"


def heads(study: Mapping[str, Any]) -> list[Cell]:
    """Heads of the columns."""
    single = [", ".join(study["keys"]), "Runs", "Cache", *FIGURES.values()]
    return [*((head, "") for head in single), *OVERLAPS.values()]


def signed(value: Real, decimals: int | None = None) -> str:
    """A difference with its sign, with three significant digits unless decimals are given.

    >>> signed(0.01234), signed(-0.5, 3), signed(0.0)
    ('+0.0123', '-0.500', '0')
    """
    return f"{'+' if value > 0 else ''}{number(value)}" if decimals is None else f"{value:+.{decimals}f}"


def difference(one: Mapping[str, Any] | None) -> Cell:
    """A difference and its interval, to two digits of the interval's half width.

    >>> difference({"mean": 0.01, "low": -0.02, "high": 0.04}), difference({"mean": 0.01, "low": None, "high": None})
    (('+0.010', '[-0.020, +0.040]'), ('+0.01', ''))
    """
    if one is None:
        return "–", ""
    if one["low"] is None:
        return signed(one["mean"]), ""
    half = (one["high"] - one["low"]) / 2
    decimals = min(6, max(0, 1 - math.floor(math.log10(half)))) if half else None
    mean, low, high = (signed(one[key], decimals) for key in ("mean", "low", "high"))
    return mean, f"[{low}, {high}]"


def _overlap(one: Mapping[str, Any] | None, no_lower: bool | None) -> str:
    mark = {None: "", True: " ✓", False: " ✗"}[no_lower]
    return "–" if one is None else number(one["mean"], 2) + mark


def rows(study: Mapping[str, Any]) -> list[list[Cell]]:
    """The baseline's own figures in its row, differences from it in the others."""
    table = []
    for group in study["groups"]:
        differences, no_lower = group["differences"], group["no_lower"]
        cells = [(group["name"], "(baseline)" * (differences is None))]
        cells += [(str(len(group["variants"])), ""), (size(group["cache_bytes"]), "")]
        for key in FIGURES:
            cells.append(difference(differences[key]) if differences else (number(group["means"][key], 4), ""))
        for kind in OVERLAPS:
            cells.append((_overlap(group["overlaps"][kind], no_lower[kind] if no_lower else None), ""))
        table.append(cells)
    return table


def notes(study: Mapping[str, Any]) -> list[str]:
    """How to read the table, a sentence or two each."""
    methods = {
        one["method"] for group in study["groups"] for one in (group["differences"] or {}).values() if one is not None
    }
    how = {"paired": "runs of the same seed paired", "welch": "Welch's test, for the runs do not pair by seed"}
    said = " and ".join(how[method] for method in sorted(methods))
    found = [
        f"Differences from {study['baseline']} with {study['confidence']:.0%} intervals (Student's t"
        + (f", {said}" if said else "")
        + "); the baseline's row has its own means."
    ]
    if not study["prompts"]:
        return [*found, "No graphs are compared: there is no prompt that all variants with graphs traced."]
    return [
        *found,
        f"Overlaps are Jaccard indices of the feature nodes of {len(study['prompts'])} graphs, against the baseline; "
        "its own row has the overlap between two of its seeds, and ✓ marks an overlap no lower than that. "
        "Same nodes: layer, feature number and position agree. Matched: features were first paired across "
        "dictionaries by what they write.",
    ]


def section(study: Mapping[str, Any]) -> dict[str, Any]:
    """The context of the section on the overview page."""
    return {"title": title(study), "heads": heads(study), "rows": rows(study), "notes": notes(study)}


def text(study: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    table = [[" ".join(cell).strip() for cell in row] for row in (heads(study), *rows(study))]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [title(study)]
    for row in table:
        first, *rest = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join((first, *rest)))
    for note in notes(study):
        lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)
