"""`circuitmill plan`: what a run needs and costs, before anything is started."""

import argparse
import json
from pathlib import Path
from typing import Any

from circuitmill.commands.overrides import split_experiment
from circuitmill.config.compose import load_run


def add(commands: Any) -> None:
    """Add the subcommand."""
    plan = commands.add_parser(
        "plan",
        help="say what memory and network a training needs, how ranks had best share it, and what the whole run costs",
    )
    plan.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="experiment=NAME train.n_features=32768")
    plan.add_argument("--variant", default="", metavar="NAME", help="whose training (default: the first)")
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int, default=0, metavar="N", help="ranks of a training, each with a GPU")
    where.add_argument("--cpu", type=int, default=1, metavar="N", help="ranks without GPUs (default: 1)")
    plan.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="of a GPU, in 10^9 bytes (default: 80)"
    )
    plan.add_argument(
        "--memory", type=float, metavar="GB", help="of the machine, which CPU ranks share (default: what this one has)"
    )
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="that jobs run on (default: 1)")
    plan.add_argument(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="GPUs of a node, or CPU ranks (default: as many as a training has)",
    )
    plan.add_argument("--shards-per-job", type=int, default=1, metavar="N", help="of the cache (default: 1)")
    plan.add_argument(
        "--disk",
        type=float,
        default=0.0,
        metavar="GB",
        help="for the run; decides about the codec (default: what is free)",
    )
    plan.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where runs lie (default: results)"
    )
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="DIR",
        help="results/RUN of a run on such hardware, for hours; parts are enough",
    )
    plan.add_argument("--cache", type=Path, metavar="MANIFEST", help="manifest.json of a finished stage cache")
    plan.add_argument(
        "--shape", metavar="LAYERSxWIDTH", help="blocks and d_model of a language model that is not known"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    plan.set_defaults(action=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from circuitmill.stages import cost_plan, train_plan, train_plan_text
    from circuitmill.stages.cost_models import parse_shape

    machine = train_plan.machine(
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        cpus=arguments.cpu,
        memory=arguments.memory,
        disk=arguments.disk,
    )
    experiment, overrides = split_experiment(arguments.overrides)
    run = load_run(experiment, overrides)
    shape = parse_shape(arguments.shape) if arguments.shape else None
    whole = cost_plan.plan_run(
        run,
        overrides,
        cost_plan.Places(machine.device == "cuda", machine.ranks, arguments.nodes, arguments.gpus_per_node),
        arguments.results / run.name,
        disk=machine.disk_bytes,
        shape=shape,
        cache=arguments.cache,
        measured=arguments.measured,
        shards_per_job=arguments.shards_per_job,
    )
    plan = train_plan.make_plan(
        run,
        machine,
        variant=arguments.variant,
        cache=arguments.cache,
        shape=shape,
        besides=whole.besides(arguments.variant or run.variants[0]),
    )
    if arguments.json:
        print(json.dumps(train_plan_text.plain(plan, whole)))
    else:
        from rich.console import Console

        console = Console()
        # not cut to what a terminal would have where there is none
        console = console if console.is_terminal else Console(width=200)
        console.print(train_plan_text.rendered(plan, whole), soft_wrap=not console.is_terminal)
    return 0 if plan.proposal.fits else 1
