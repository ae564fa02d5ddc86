"""Stands in for circuitmill.cli in workflow tests: writes the declared outputs at once and notes the call.

What comes before the stage, `launch --per-node N`, is left beside it.
"""

import json
import sys
from pathlib import Path


def main() -> int:
    arguments = sys.argv[1:]
    out = Path(arguments[arguments.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    if arguments[0] == "launch":
        (out / "launch.json").write_text(json.dumps(arguments[:3]))
        arguments = arguments[3:]
    if "--prompt" in arguments:
        (out / "graph.json").write_text("{}")
    (out / "manifest.json").write_text(json.dumps(arguments))
    return 0
