"""`circuitmill plan`: what a run needs, before anything is started."""

import argparse
import json
from pathlib import Path
from typing import Any

from circuitmill.commands.overrides import split_experiment


def add(commands: Any) -> None:
    """Add the subcommand."""
    plan = commands.add_parser(
        "plan", help="say what memory, network and disk a training needs, and how ranks had best share it"
    )
    plan.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="experiment=NAME train.n_features=32768")
    plan.add_argument("--variant", default="", metavar="NAME", help="of the run (default: the first)")
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int, default=0, metavar="N", help="ranks, each with a GPU")
    where.add_argument("--cpu", type=int, default=1, metavar="N", help="ranks without GPUs (default: 1)")
    plan.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="of a GPU, in 10^9 bytes (default: 80)"
    )
    plan.add_argument(
        "--memory", type=float, metavar="GB", help="of the machine, which CPU ranks share (default: what this one has)"
    )
    plan.add_argument("--disk", type=float, default=0.0, metavar="GB", help="for the cache; decides about its codec")
    plan.add_argument("--cache", type=Path, metavar="MANIFEST", help="manifest.json of a finished stage cache")
    plan.add_argument(
        "--shape", metavar="LAYERSxWIDTH", help="blocks and d_model of a language model that is not known"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    plan.set_defaults(action=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from circuitmill.stages import train_plan, train_plan_text

    plan = train_plan.make_plan(
        *split_experiment(arguments.overrides),
        train_plan.machine(
            gpus=arguments.gpus,
            gpu_memory=arguments.gpu_memory,
            cpus=arguments.cpu,
            memory=arguments.memory,
            disk=arguments.disk,
        ),
        variant=arguments.variant,
        cache=arguments.cache,
        shape=train_plan.parse_shape(arguments.shape) if arguments.shape else None,
    )
    if arguments.json:
        print(json.dumps(train_plan_text.plain(plan)))
    else:
        from rich.console import Console

        console = Console()
        # not cut to what a terminal would have where there is none
        console = console if console.is_terminal else Console(width=200)
        console.print(train_plan_text.rendered(plan), soft_wrap=not console.is_terminal)
    return 0 if plan.proposal.fits else 1
