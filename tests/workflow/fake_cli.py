"""Stands in for circuitmill.cli in workflow tests: writes the declared outputs at once and notes the call.

What comes before the stage, `launch --per-node N --threads N`, is left beside it.
"""

import json
import os
import sys
from pathlib import Path

BESIDE = {
    "attribute": ["graph.json"],
    "evaluate": [f"plots/{name}.svg" for name in ("explained_variance", "l0", "density")],
    "report": ["tables.html"],
}
"""Declared outputs of a stage besides manifests."""


def values(arguments: list[str], flag: str) -> list[str]:
    given = arguments[arguments.index(flag) + 1 :]
    return given[: next((place for place, word in enumerate(given) if word.startswith("--")), None)]


def main() -> int:
    arguments = sys.argv[1:]
    for out in map(Path, values(arguments, "--out")):
        out.mkdir(parents=True, exist_ok=True)
        own = arguments
        if own[0] == "launch":
            at = own.index("train")
            (out / "launch.json").write_text(json.dumps(own[:at]))
            own = own[at:]
        for name in BESIDE.get(own[0], ()) if own[0] != "attribute" or "--prompt" in own else ():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("{}")
        if gpus := os.environ.get("CIRCUITMILL_GPUS"):
            (out / "gpus.json").write_text(json.dumps([gpus, os.environ["CIRCUITMILL_RULE_GPUS"]]))
        (out / "manifest.json").write_text(json.dumps(own))
    return 0
