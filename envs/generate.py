"""Write the conda files: for each family of stages the pins of constraints.txt that it needs.

    python -m envs.generate

What a package needs is read from the packages that are installed here, which must be all that are pinned (`make dev`).
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
CONTROLLER = {"snakemake", "snakemake-executor-plugin-slurm"}
"""What starts jobs; jobs themselves do not need it."""
INTERPRET = {"torch", "numpy", "pyarrow", "jaxtyping", "pyyaml", "rich"}
"""Stage interpret reads and writes tables and runs no model; torch is how any stage asks which rank it is."""
PYTHON = "3.11"
PURPOSE = {
    "core": "all stages but interpret: what the container has, without Snakemake",
    "interpret": "stage interpret, which reads and writes tables and runs no model",
    "dev": "this checkout's development: afterwards `pip install --no-deps -e .` in it",
}


def lock() -> dict[str, str]:
    """Normalized name -> pin, a line of constraints.txt."""
    lines = re.findall(r"^[\w.-]+==\S+$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(line.split("==")[0]): line for line in lines}


def needed(roots: Iterable[str]) -> set[str]:
    """Normalized names of all that some requirements need, they included."""
    target = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    names = set[str]()
    seen = set[tuple[str, str]]()
    todo = [Requirement(root) for root in roots]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        names.add(name)
        for extra in ("", *one.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            further = [Requirement(text) for text in requires(name) or ()]
            here = {**target, "extra": extra}
            todo += [each for each in further if each.marker is None or each.marker.evaluate(here)]
    return names


def roots(family: str) -> list[str]:
    """Requirements of a family, as pyproject.toml has them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    own = [text for text in project["dependencies"] if Requirement(text).marker is None]
    if family == "dev":
        return own + project["optional-dependencies"]["dev"]
    by_name: dict[str, str] = {canonicalize_name(Requirement(text).name): text for text in own}
    wanted = INTERPRET if family == "interpret" else by_name.keys() - CONTROLLER
    return [by_name[name] for name in sorted(wanted)]


def pins(requirements: Iterable[str]) -> list[str]:
    """Lines of constraints.txt of all that some requirements need; torch names itself what it brings for CUDA."""
    locked = lock()
    return [locked[name] for name in sorted(needed(requirements) & locked.keys())]


def conda_file(family: str) -> str:
    """The text of envs/<family>.yaml.

    No path stands in it: Snakemake copies it elsewhere before conda reads it. The package itself is found by
    PYTHONPATH, which the workflow sets.
    """
    head = (
        "# The pins of constraints.txt, by `python -m envs.generate`. A test compares the two; none installs this.\n"
        f"# For {PURPOSE[family]}.\n"
        "channels: [conda-forge, nodefaults]\n"
        "dependencies:\n"
        f"  - python={PYTHON}\n"
        "  - pip\n"
        "  - pip:\n"
    )
    return head + "".join(f"      - {line}\n" for line in pins(roots(family)))


def main() -> int:
    """Write all of them."""
    for family in PURPOSE:
        (REPOSITORY / f"envs/{family}.yaml").write_text(conda_file(family))
    return 0


if __name__ == "__main__":
    sys.exit(main())
