"""What the stages of a run ask of each other: checked before any job, all complaints at once."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from circuitmill.config.decode import Complaint
from circuitmill.errors import ConfigError

_BASE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


def qualified(base: str, run: str) -> str:
    """`train.base` as run/variant; empty if there is none.

    >>> qualified("clt", "demo"), qualified("gpt2/main", "demo"), qualified("", "demo")
    ('demo/clt', 'gpt2/main', '')
    """
    return base if not base or "/" in base else f"{run}/{base}"


def check_together(run: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse stages that do not go together.

    Args:
        run: Name of the run.
        configs: Variant -> stage -> frozen configuration.

    Raises:
        ConfigError: names every key, and the variants if there are several.
    """
    bases = {variant: qualified(stages["train"].base, run) for variant, stages in configs.items()}
    found: dict[Complaint, list[str]] = {}
    for variant, stages in configs.items():
        for complaint in (*_activations(stages), *_base(variant, run, bases)):
            found.setdefault(complaint, []).append(variant)
    if not found:
        return
    lines = [f"{complaint}" + f" in {', '.join(names)}" * (len(configs) > 1) for complaint, names in found.items()]
    raise ConfigError(
        "stages that go together",
        found=f"{len(found)} problem(s)\n    " + "\n    ".join(lines),
        where=", ".join(dict.fromkeys(complaint.key for complaint in found)),
        fix="change one of the options that a line names",
    )


def _activations(stages: Mapping[str, Any]) -> Iterator[Complaint]:
    """What is cached is what the transcoder reads and writes."""
    form, cache, calibrate = stages["train"].architecture, stages["cache"], stages["calibrate"]
    if form.reproduces and cache.targets != "inputs":
        yield Complaint(
            "cache.targets",
            f"inputs with train.architecture.topology {form.topology}, which writes what it reads",
            f"{cache.targets}, with cache.hookpoint {cache.hookpoint}",
            "name another hookpoint, such as resid_post",
        )
    if not form.reproduces and cache.targets == "inputs":
        yield Complaint(
            "train.architecture.topology",
            f"sae or crosscoder with cache.targets inputs (cache.hookpoint {cache.hookpoint})",
            form.topology,
            "all others read MLP inputs and write MLP outputs: cache.hookpoint mlp",
        )
    models, second = 1 if cache.second_model is None else 2, _show(cache.second_model)
    if form.topology == "crosscoder" and form.models != models:
        yield Complaint("train.architecture.models", f"{models}, as cache.second_model is {second}", str(form.models))
    if form.topology != "crosscoder" and models == 2:
        yield Complaint(
            "cache.second_model",
            f"null with train.architecture.topology {form.topology}: only a crosscoder reads two models",
            second,
        )
    for key in ("hookpoint", "layers", "second_model"):
        ours, theirs = getattr(calibrate, key), getattr(cache, key)
        if ours != theirs:
            yield Complaint(f"calibrate.{key}", f"cache.{key}, {_show(theirs)}", _show(ours), "leave it out")


def _base(variant: str, run: str, bases: Mapping[str, str]) -> Iterator[Complaint]:
    """A base is there, or is of another run, and does not lead back."""
    base = bases[variant]
    own = {f"{run}/{name}": name for name in bases}
    if not base:
        return
    if not _BASE.match(base):
        yield Complaint("train.base", "a variant of this run, or run/variant", repr(base))
    elif base.split("/")[0] == run and base not in own:
        yield Complaint("train.base", f"a variant of this run ({', '.join(bases)}), or run/variant", repr(base))
    else:
        seen = [variant]
        while base in own and own[base] not in seen:
            seen.append(own[base])
            base = bases[own[base]]
        if base in own:
            yield Complaint(
                "train.base", "a training that does not start from its own outcome", " -> ".join((*seen, own[base]))
            )


def _show(value: object) -> str:
    return "null" if value is None else str(getattr(value, "name", value))
