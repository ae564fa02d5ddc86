"""`circuitmill usage`: what a run took of what its jobs had asked for."""

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the subcommand."""
    usage = commands.add_parser("usage", help="say what a run's jobs used, and which requests are far from it")
    usage.add_argument("folder", type=Path, help="results/<run>")
    usage.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    usage.set_defaults(action=_usage)


def _usage(arguments: argparse.Namespace) -> None:
    from circuitmill.stages.report_usage import usage_of_run
    from circuitmill.viz import usage_view

    usage = usage_of_run(arguments.folder)
    if arguments.json:
        print(json.dumps(usage_view.document(usage)))
        return
    from rich.console import Console

    console = Console()
    # not cut to what a terminal would have where there is none
    console = console if console.is_terminal else Console(width=200)
    console.print(usage_view.rendered(usage), soft_wrap=not console.is_terminal)
