"""`circuitmill status`, `cancel` and `resume`: a run that the workflow works on, here or on a Slurm cluster."""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMEOUT_S = 180.0


def add(commands: Any) -> None:
    """Add the subcommands."""
    status = commands.add_parser(
        "status", help="say what a run is at: its controller, manifests, Slurm jobs and failed jobs"
    )
    status.add_argument("folder", type=Path, help="results/<run>")
    status.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    status.set_defaults(action=_status)
    cancel = commands.add_parser(
        "cancel", help="end a run's controller and cancel its Slurm jobs, those of killed controllers too"
    )
    cancel.add_argument("folder", type=Path, help="results/<run>")
    _add_waiting(cancel)
    cancel.set_defaults(action=_cancel)
    resume = commands.add_parser(
        "resume",
        help="cancel what a dead controller left, and run its command again",
        usage="circuitmill resume [-h] [--dry-run] [--timeout SECONDS] [--elsewhere] folder [-- SNAKEMAKE OPTIONS]",
    )
    resume.add_argument("folder", type=Path, help="results/<run>; options after -- go to snakemake")
    resume.add_argument("--dry-run", action="store_true", help="print what it would do")
    _add_waiting(resume)
    resume.set_defaults(action=_resume)
    _keep_rest(resume)


def _add_waiting(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"to wait until all of it has ended (default: {_TIMEOUT_S:g})",
    )
    command.add_argument(
        "--elsewhere", action="store_true", help="a controller that was started on another machine is dead"
    )


def _keep_rest(command: argparse.ArgumentParser) -> None:
    """Keep what follows `--` as `extra`; argparse takes it for unknown arguments if an option stands before it."""
    parse = command.parse_known_args

    @functools.wraps(parse)
    def split(args: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        words = list(args)
        at = words.index("--") if "--" in words else len(words)
        found, unknown = parse(words[:at], namespace)
        found.extra = words[at + 1 :]
        return found, unknown

    command.parse_known_args = split  # type: ignore[method-assign, assignment]


def _tell(line: str) -> None:
    print(line, flush=True)


def _status(arguments: argparse.Namespace) -> None:
    from circuitmill.cluster import status, status_text

    found = status.status_of(arguments.folder)
    if arguments.json:
        print(json.dumps(status.plain(found)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    # not cut to what a terminal would have where there is none
    console = console if console.is_terminal else Console(width=200, highlight=False)
    console.print(status_text.rendered(found), soft_wrap=not console.is_terminal)


def _cancel(arguments: argparse.Namespace) -> None:
    from circuitmill.cluster.ending import cancel

    cancel(arguments.folder, timeout=arguments.timeout, elsewhere=arguments.elsewhere, tell=_tell)


def _resume(arguments: argparse.Namespace) -> None:
    from circuitmill.cluster.ending import find_resumable, plan_resume, resume

    work = find_resumable(arguments.folder, elsewhere=arguments.elsewhere)
    if arguments.dry_run:
        for line in plan_resume(work, arguments.extra):
            print(line)
        return
    resume(work, arguments.extra, timeout=arguments.timeout, tell=_tell)
