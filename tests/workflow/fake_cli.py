"""Stands in for circuitmill.cli in workflow tests: writes the declared outputs at once and notes the call."""

import json
import sys
from pathlib import Path


def main() -> int:
    arguments = sys.argv[1:]
    out = Path(arguments[arguments.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    if "--prompt" in arguments:
        (out / "graph.json").write_text("{}")
    (out / "manifest.json").write_text(json.dumps(arguments))
    return 0
