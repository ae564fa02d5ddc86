"""A plan as text and as plain data."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from circuitmill.stages import cost_text
from circuitmill.stages.cost_plan import RunPlan
from circuitmill.stages.cost_sizes import size
from circuitmill.stages.cost_text import new_table
from circuitmill.stages.train_plan import Plan
from circuitmill.training.parallel.plan import DEAD_SHARE, RESERVE, SLACK, Estimate


def rendered(plan: Plan, run: RunPlan) -> Group:
    """Tables, and at the end what to paste."""
    parts: list[Any] = [_head(plan), _parameters(plan), _strategies(plan), *_wire(plan)]
    if plan.codecs:
        parts.append(_codecs(plan))
    parts += [Text(f"note: {note}") for note in plan.notes]
    return Group(*parts, *cost_text.rendered(run), Text(_verdict(plan)))


def _head(plan: Plan) -> Text:
    machine, cfg = plan.machine, plan.cfg
    what = "GPU" if machine.device == "cuda" else "CPU rank"
    lines = [
        f"{plan.run} / {plan.variant}: {machine.ranks} {what}{'s' * (machine.ranks > 1)} with "
        f"{size(machine.memory_bytes)} each",
        f"{plan.shape.n_layers} places x {plan.shape.d_model} (from {plan.shape_from}), {cfg.n_features} features, "
        f"{cfg.batch_tokens} tokens a step, micro_batches {cfg.optimizer.micro_batches}, {cfg.optimizer.name}, "
        f"{cfg.optimizer.precision}",
    ]
    return Text("\n".join(lines))


def _parameters(plan: Plan) -> Table:
    table = new_table("Parameters", "", "numbers")
    for kind, number in plan.parameters.items():
        table.add_row(kind, f"{number:,}")
    table.add_section()
    table.add_row("all", f"{sum(plan.parameters.values()):,}")
    return table


def name_of(estimate: Estimate) -> str:
    """The strategy, with what mesh leaves open."""
    if estimate.strategy == "mesh" and estimate.feature_ranks > 1:
        return f"mesh {estimate.division.data_ranks} x {estimate.feature_ranks}"
    return estimate.strategy


def _strategies(plan: Plan) -> Table:
    heads = ("weights", "gradients", "optimizer", "activations", "batch", "at most", "with reserve", "host", "")
    table = new_table("Memory of a rank", "strategy", *heads)
    for each in plan.estimates:
        if each.memory is None:
            table.add_row(name_of(each), *[""] * (len(heads) - 1), f"not possible: {each.impossible}")
            continue
        need = each.memory
        parts = (need.weights, need.gradients, need.optimizer, need.activations, need.batch)
        table.add_row(
            name_of(each),
            *map(size, parts),
            f"{size(need.peak)} ({need.moment})",
            size(each.total),
            size(sum(each.host.values())),
            "fits" if each.fits else "does not fit",
        )
    table.caption = _assumptions(plan)
    return table


def _assumptions(plan: Plan) -> str:
    found = next((each.memory for each in plan.estimates if each.memory is not None), None)
    if found is None:
        return ""
    places = f"at most {found.share:.1%} of the places are kept"
    how = "at some time activations are dense" if found.dense else places
    if "auxiliary" in plan.cfg.active_kinds():
        how += f"; {DEAD_SHARE:.0%} of the features are dead"
    device = plan.machine.device
    rest = f"{size(RESERVE[device])} for libraries and {SLACK[device]:.0%} for what the allocator cannot use"
    rest += "; on CPUs also what is under host" * (device == "cpu")
    return (
        f"At most: when most is there at a time, not the sum. Taken for granted: {how}.\nReserve: {rest}. "
        "Host: memory of the machine for tokens that are shuffled and for a checkpoint on its way to disk."
    )


def _wire(plan: Plan) -> Iterator[Table]:
    possible = [each for each in plan.estimates if each.memory is not None and each.division.ranks > 1]
    if not possible:
        return
    names = [(part, name) for each in possible for part, name, _ in _lines(each)]
    table = new_table("Handed to collectives by a rank in a step", "", *map(name_of, possible))
    for part, name in dict.fromkeys(names):
        found = [next((n for p, k, n in _lines(each) if (p, k) == (part, name)), 0) for each in possible]
        table.add_row(name + part, *(size(n) if n else "" for n in found))
    table.add_section()
    table.add_row("all", *(size(each.payload.most) for each in possible))
    yield table


def _lines(each: Estimate) -> list[tuple[str, str, int]]:
    sent = each.payload
    parts = {"": sent.step, " (by torch)": sent.torch, " (if any is dead)": sent.dead}
    return [(part, name, number) for part, found in parts.items() for name, number in found.items()]


def _codecs(plan: Plan) -> Table:
    heads = ("a token", "cache", "read by a rank in a step", "")
    table = new_table(f"Cache of {plan.cached_tokens:,} tokens" if plan.cached_tokens else "Cache", "codec", *heads)
    for each in plan.codecs:
        if each.problem:
            table.add_row(each.codec, "", "", "", f"needs {each.problem}")
            continue
        total = size(each.cache_bytes) if plan.cached_tokens else "as many as the text has"
        fits = plan.room is None or each.cache_bytes <= plan.room
        note = ", ".join(["proposed"] * (each.codec == plan.codec) + ["more than the disk has"] * (not fits))
        table.add_row(each.codec, size(each.token_bytes), total, size(each.step_bytes), note)
    return table


def _verdict(plan: Plan) -> str:
    if plan.proposal.fits:
        head = f"\nProposed: {name_of(plan.proposal)}\n  "
        return head + " ".join(plan.overrides)
    least = f"{name_of(plan.proposal)} needs least, {size(plan.proposal.total)} a rank"
    return "\n  ".join([f"\nNothing fits: {least}. One of these would:", *plan.remedies])


def plain(plan: Plan, run: RunPlan) -> dict[str, Any]:
    """The same as one JSON object; sizes in bytes."""
    machine, chosen = plan.machine, plan.proposal
    return {
        "run": plan.run,
        "variant": plan.variant,
        "device": machine.device,
        "ranks": machine.ranks,
        "memory_bytes": machine.memory_bytes,
        "shape": {"n_layers": plan.shape.n_layers, "d_model": plan.shape.d_model, "from": plan.shape_from},
        "parameters": plan.parameters | {"all": sum(plan.parameters.values())},
        "estimates": [_plain_estimate(each) for each in plan.estimates],
        "cached_tokens": plan.cached_tokens,
        "codecs": [vars(each) for each in plan.codecs],
        "proposal": {
            "strategy": chosen.strategy,
            "feature_ranks": chosen.feature_ranks,
            "micro_batches": chosen.micro_batches,
            "codec": plan.codec,
            "fits": chosen.fits,
            "overrides": plan.overrides,
        },
        "remedies": plan.remedies,
        "notes": [*plan.notes, *run.notes],
        **cost_text.plain(run),
    }


def _plain_estimate(each: Estimate) -> dict[str, Any]:
    found: dict[str, Any] = {
        "strategy": each.strategy,
        "feature_ranks": each.feature_ranks,
        "micro_batches": each.micro_batches,
        "impossible": each.impossible,
        "fits": each.fits,
    }
    if each.memory is None:
        return found
    need, sent = each.memory, each.payload
    return found | {
        "memory": {**vars(need), "peak": need.peak, "moment": need.moment},
        "reserve": each.reserve,
        "total": each.total,
        "host": each.host,
        "wire": {"step": sent.step, "dead": sent.dead, "row": sent.row, "torch": sent.torch, "most": sent.most},
    }
