"""What a whole run costs, as text and as plain data."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from circuitmill.stages.cost_jobs import GPU_RULES
from circuitmill.stages.cost_plan import Jobs, RunPlan
from circuitmill.stages.cost_sizes import size
from circuitmill.stages.cost_work import Real

_NAMED = 3
"""Variants that are named; more are counted."""


def duration(seconds: Real) -> str:
    """In the unit that a reader would take.

    >>> [duration(number) for number in (0.4, 95, 600, 9000, 400_000)]
    ['0.4 s', '95 s', '10 min', '2.5 h', '4.6 d']
    """
    for unit, length, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until:
            return f"{seconds / length:.2g} {unit}" if seconds / length < 10 else f"{seconds / length:.0f} {unit}"
    days = seconds / 86_400
    return f"{days:.2g} d" if days < 10 else f"{days:,.0f} d"


def rendered(plan: RunPlan) -> Iterator[Table | Text]:
    """Tables, and what to be warned of."""
    yield _tokens(plan)
    yield _disk(plan)
    yield from (Text(f"WARNING: {warning}", style="bold red") for warning in plan.warnings)
    yield _jobs(plan)
    yield Text(_time(plan))
    yield from (Text(f"note: {note}") for note in plan.notes)


def new_table(title: str, *heads: str) -> Table:
    """An empty table; all columns but the first are of numbers."""
    found = Table(title=title, title_justify="left", box=box.SIMPLE, caption_justify="left")
    for index, head in enumerate(heads):
        found.add_column(head, justify="right" if index else "left")
    return found


def _of(stage: str, variants: tuple[str, ...], plan: RunPlan) -> str:
    """A stage, and of which variants if not of all."""
    if not variants or variants == plan.variants:
        return stage
    shown = ", ".join(variants) if len(variants) <= _NAMED else f"{variants[0]} and {len(variants) - 1} more"
    return f"{stage} ({shown})"


def _tokens(plan: RunPlan) -> Table:
    found = new_table("Tokens, BOS included", "stage", "train", "held-out")
    found.add_column("")
    for row in plan.tokens:
        found.add_row(_of(row.stage, row.variants, plan), _number(row.train), _number(row.heldout), row.note)
    if plan.about:
        found.caption = "about: as many as the embedded corpus is likely to make"
    return found


def _number(tokens: int | None) -> str:
    return "all there are" if tokens is None else f"{tokens:,}" if tokens else ""


def _disk(plan: RunPlan) -> Table:
    found = new_table("Disk", "stage", "at most", "not there yet")
    for stage in dict.fromkeys(each.stage for each in plan.disk.stored):
        own = [each for each in plan.disk.stored if each.stage == stage]
        what = f"{stage} ({len(own)} folders)" if len(own) > 1 else stage
        if None in [each.bytes for each in own]:
            found.add_row(what, "not known", "")
        else:
            found.add_row(what, size(sum(each.bytes or 0 for each in own)), size(sum(each.left or 0 for each in own)))
    found.add_section()
    found.add_row("all", size(plan.disk.bytes), size(plan.disk.left))
    found.add_row("free", "", size(max(0, plan.disk.free)))
    found.caption = f"free: {plan.disk.where}; a training with all its checkpoints, one of them being written"
    return found


def _jobs(plan: RunPlan) -> Table:
    hours = "GPU time" if plan.places.gpus else "in all"
    timed = plan.wall_seconds is not None
    found = new_table(
        "Jobs", "rule", "jobs", "at once", *(["longest", hours, "scaled by", "measured on"] if timed else [])
    )
    found.add_row("configure", f"{plan.configure:,}", "")
    for row in plan.jobs:
        found.add_row(row.rule, f"{row.jobs:,}", f"{row.at_once:,}", *(_timed(row, plan) if timed else []))
    found.add_section()
    summed = plan.gpu_seconds if plan.places.gpus else sum(row.seconds or 0.0 for row in plan.jobs)
    found.add_row("all", f"{plan.n_jobs:,}", "", *(["", _summed(summed), "", ""] if timed else []))
    return found


def _summed(seconds: Real) -> str:
    """Of many jobs: hours stay hours.

    >>> _summed(90), _summed(3_600_000)
    ('90 s', '1,000 h')
    """
    return duration(seconds) if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


def _ratio(number: Real) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _timed(row: Jobs, plan: RunPlan) -> list[str]:
    if row.seconds is None or row.longest is None or row.scaled is None:
        return ["not known", "", "", row.why]
    counted = not plan.places.gpus or row.rule in GPU_RULES
    device = ", ".join(name or "not noted" for name in row.devices)
    return [duration(row.longest), _summed(row.seconds) if counted else "", _ratio(row.scaled), device]


def _time(plan: RunPlan) -> str:
    places = plan.places
    per_node = places.total // places.nodes
    what = "GPU" if places.gpus else "CPU rank"
    where = f"{places.nodes} node{'s' * (places.nodes > 1)} x {per_node} {what}{'s' * (per_node > 1)}"
    if plan.wall_seconds is None:
        return (
            "Hours are not known, for nothing has been measured. Any run on the hardware in question tells something,\n"
            "also one that is finished in part. This one is short: run it there, and plan with "
            f"--measured results/{plan.trial_name}\n  {plan.trial}"
        )
    ends = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in plan.ends.items())
    least = "at least " if plan.unknown else ""
    lines = [f"Wall time on {where}: {least}{duration(plan.wall_seconds)}; until the end of {ends}"]
    if plan.unknown:
        lines.append(f"without {', '.join(plan.unknown)}, whose time is not known")
    return "\n".join(lines)


def plain(plan: RunPlan) -> dict[str, Any]:
    """The same as plain data; sizes in bytes, times in seconds, None for what is not known."""
    places, disk = plan.places, plan.disk
    return {
        "tokens": [asdict(row) for row in plan.tokens],
        "tokens_are_estimates": plan.about,
        "disk": {
            "stored": [asdict(each) for each in disk.stored],
            "bytes": disk.bytes,
            "left": disk.left,
            "free": disk.free,
            "where": disk.where,
            "unknown": disk.unknown,
            "short": disk.short,
        },
        "jobs": {
            "all": plan.n_jobs,
            "configure": plan.configure,
            "rules": [asdict(row) for row in plan.jobs],
        },
        "time": {
            "measured": None if plan.measured is None else str(plan.measured),
            "nodes": places.nodes,
            "places": places.total,
            "wall_seconds": plan.wall_seconds,
            "gpu_seconds": plan.gpu_seconds if places.gpus and plan.wall_seconds is not None else None,
            "ends": plan.ends,
            "unknown": plan.unknown,
            "how_to_measure": plan.trial,
        },
        "warnings": plan.warnings,
    }
