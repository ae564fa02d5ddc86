"""The command line: one subcommand per stage, and a few around a finished run.

    circuitmill train --config results/demo/main/config/train.yaml --cache results/demo/cache/manifest.json --out DIR
    circuitmill train experiment=demo train.lr=3e-4 --cache results/demo/cache/manifest.json --out DIR

Only this module turns an error into an exit code: 2 for configuration, 75 for "stopped by a signal, run me again",
1 for the rest.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuitmill import __version__, gpus, logs
from circuitmill.commands import plan, slurm, usage
from circuitmill.commands.overrides import split_experiment
from circuitmill.errors import CircuitmillError, ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM, STAGES, Stage

_log = logging.getLogger(__name__)

_SUMMARY = {
    "toyworld": "make the embedded corpus and language model with known circuits",
    "tokenize": "pack documents into fixed-length token sequences",
    "calibrate": "measure what the codecs of the activation store need to know",
    "cache": "store MLP inputs and outputs of every layer",
    "train": "train the cross-layer transcoder",
    "evaluate": "measure fit, sparsity and the replacement model on held-out tokens",
    "features": "collect windows, densities and logit weights of every feature",
    "interpret": "explain every feature and score the explanation",
    "attribute": "trace an attribution graph per prompt",
    "report": "write the browsable page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    logs.configure(verbose=arguments.verbose)
    try:
        return arguments.action(arguments) or 0
    except CircuitmillError as error:
        print(f"circuitmill {arguments.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"circuitmill {arguments.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="circuitmill",
        description="Text goes in, attribution graphs come out.",
    )
    parser.add_argument("--version", action="version", version=f"circuitmill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        _add_stage(commands, stage)
    _add_tools(commands)
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="log at debug level")
    return parser


def _add_stage(commands: Any, stage: Stage) -> None:
    command = commands.add_parser(stage.name, help=_SUMMARY[stage.name], description=_SUMMARY[stage.name])
    command.set_defaults(action=_run_stage, stage=stage)
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="compose the configuration: experiment=NAME train.lr=3e-4"
    )
    command.add_argument("--config", type=Path, metavar="YAML", help="take a frozen configuration instead")
    for name in stage.upstream:
        command.add_argument(
            f"--{name}",
            type=Path,
            metavar="MANIFEST",
            required=name != OPTIONAL_UPSTREAM,
            # the workflow writes the flag for every run; one without the embedded model leaves its value out
            nargs="?" if name == OPTIONAL_UPSTREAM else None,
            help=f"manifest.json of stage {name}" + (" (embedded model only)" * (name == OPTIONAL_UPSTREAM)),
        )
    if stage.unit:
        command.add_argument(
            f"--{stage.unit}",
            nargs="+",
            metavar="NAME",
            help=f"do one {stage.unit}, or several in turn; without it gather all that are done",
        )
    if stage.name == "train":
        command.add_argument(
            "--base",
            type=Path,
            nargs="?",
            metavar="MANIFEST",
            help="manifest.json of the training that train.base names",
        )
    if stage.name == "report":
        command.add_argument(
            "--siblings", type=Path, nargs="*", default=[], metavar="MANIFEST", help="evaluations of other variants"
        )
        command.add_argument(
            "--study",
            type=Path,
            nargs="*",
            default=[],
            metavar="MANIFEST",
            help="of all variants: train, evaluate, attribute and the shared stages in which they differ",
        )
        command.add_argument(
            "--benchmarks", type=Path, metavar="DIR", help="benchmark files of the run: what jobs used and asked for"
        )
    several = f", of each {stage.unit}" if stage.unit else ""
    command.add_argument(
        "--out",
        type=Path,
        nargs="+" if stage.unit else 1,
        required=True,
        metavar="DIR",
        help=f"folder that belongs to this stage{several}",
    )


def _add_tools(commands: Any) -> None:
    config = commands.add_parser("config", help="print a composed configuration, checked")
    config.add_argument("overrides", nargs="*", default=["experiment=demo"], metavar="KEY=VALUE")
    config.add_argument("--stage", choices=[stage.name for stage in STAGES], help="only this stage")
    config.add_argument("--variant", default="", help="as this variant uses it")
    config.add_argument("--keys", action="store_true", help="a table of every key with type, value and meaning instead")
    config.add_argument(
        "--site", action="store_true", help="every key of a site file, which says where a run runs, instead"
    )
    config.set_defaults(action=_config)
    launch = commands.add_parser(
        "launch", help="run a subcommand as several ranks, on this machine or on every node of a Slurm step"
    )
    launch.add_argument(
        "--per-node", type=int, metavar="N", help="ranks per node (default: one per GPU, or one where there is none)"
    )
    launch.add_argument("--threads", type=int, metavar="N", help="of this node, which its ranks share out")
    launch.add_argument(
        "ranked", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="what circuitmill would be called with"
    )
    launch.set_defaults(action=_launch)
    plan.add(commands)
    usage.add(commands)
    slurm.add(commands)
    export = commands.add_parser("export", help="write a finished transcoder in circuit-tracer's layout")
    export.add_argument("--train", type=Path, required=True, metavar="MANIFEST", help="manifest.json of stage train")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    export.set_defaults(action=_export)
    verify = commands.add_parser(
        "verify", help="check every manifest and every byte below a folder, and name all that is wrong"
    )
    verify.add_argument("path", type=Path, help="results/<run>, any folder below it, or one manifest.json")
    verify.set_defaults(action=_verify)
    serve = commands.add_parser("serve", help="serve a run's pages on 127.0.0.1, read-only")
    serve.add_argument("folder", type=Path, help="results/<run>, or any folder below it")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.set_defaults(action=_serve)
    summary = commands.add_parser("summary", help="print the headline figures of a finished run")
    summary.add_argument("folder", type=Path, help="results/<run>")
    summary.add_argument("--elapsed", type=float, metavar="SECONDS", help="wall time to report with it")
    summary.set_defaults(action=_summary)


def _stage_config(arguments: argparse.Namespace) -> Any:
    from circuitmill.config.compose import load_run, read_frozen
    from circuitmill.config.decode import decode
    from circuitmill.config.run import config_class

    name = arguments.stage.name
    if arguments.config is not None:
        if arguments.overrides:
            raise ConfigError(
                "either --config FILE or overrides",
                found=f"--config {arguments.config} and {' '.join(arguments.overrides)}",
                where="command line",
                fix="leave one of them out",
            )
        return decode(config_class(name), read_frozen(arguments.config), name)
    run = load_run(*split_experiment(arguments.overrides))
    if name not in run.stages:
        raise ConfigError(
            f"a run that has stage {name}", found=run.name, where="experiment", fix="choose another experiment"
        )
    return next(iter(run.stages[name].values()))


def _run_stage(arguments: argparse.Namespace) -> None:
    stage: Stage = arguments.stage
    cfg = _stage_config(arguments)
    inputs: dict[str, Any] = {name: getattr(arguments, name) for name in stage.upstream}
    if stage.name == "train":
        inputs["base"] = arguments.base
    if stage.name == "report":
        inputs |= {"siblings": tuple(arguments.siblings), "study": tuple(arguments.study)}
        inputs["benchmarks"] = arguments.benchmarks
    units = _units(arguments, stage, cfg)
    gpus.lease(f"{stage.name}_{stage.unit}" if units else f"run_{stage.name}")
    # torch comes in only here, so that --help and configuration errors answer at once
    from circuitmill import distributed

    ranks = distributed.init(cfg.parallel.timeout_s if stage.name == "train" else None)
    logs.configure(ranks.rank, verbose=arguments.verbose)
    try:
        with distributed.watched(ranks):
            module = importlib.import_module(f"circuitmill.stages.{stage.name}")
            if not units:
                module.run(cfg, **inputs, out=arguments.out[0])
            elif len(units) == 1:
                module.run_unit(cfg, **{str(stage.unit): units[0]}, **inputs, out=arguments.out[0])
            else:
                _run_units(module, stage, cfg, inputs, dict(zip(units, arguments.out, strict=True)))
    finally:
        distributed.shutdown()


def _units(arguments: argparse.Namespace, stage: Stage, cfg: Any) -> list[str]:
    """The units that are asked for; none if the stage is to be gathered."""
    units = (getattr(arguments, stage.unit) or []) if stage.unit else []
    for unit in units:
        if unit not in cfg.units():
            raise ConfigError(
                f"one of the {len(cfg.units())} {stage.unit}s of this configuration",
                found=unit,
                where=f"--{stage.unit}",
                fix="known: " + (", ".join(cfg.units()[:8]) or "none"),
            )
    if len(arguments.out) != max(1, len(units)):
        raise ConfigError(
            f"{max(1, len(units))} folder(s), one for each {stage.unit or 'stage'}",
            found=len(arguments.out),
            where="--out",
            fix="name as many folders",
        )
    return units


def _run_units(module: Any, stage: Stage, cfg: Any, inputs: dict[str, Any], folders: dict[str, Path]) -> None:
    """Several units in turn; what is finished is not done again if the job ends before the last one is."""
    from circuitmill.stores.aside import is_aside, put_back, set_aside
    from circuitmill.stores.manifest import load_upstreams

    upstreams = load_upstreams(**inputs)
    for unit, folder in folders.items():
        if is_aside(folder, stage.name, unit, cfg, upstreams):
            _log.info("%s %s is finished already", stage.unit, unit)
        else:
            module.run_unit(cfg, **{str(stage.unit): unit}, **inputs, out=folder)
            set_aside(folder)
    for folder in folders.values():
        put_back(folder)


def _config(arguments: argparse.Namespace) -> None:
    from circuitmill.config.compose import freeze, load_run
    from circuitmill.config.describe import markdown, site_text

    if arguments.site:
        print(site_text())
        return
    run = load_run(*split_experiment(arguments.overrides))
    if arguments.keys:
        print(markdown(run))
        return
    for name in [arguments.stage] if arguments.stage else run.stage_names():
        only = run.home(name, arguments.variant) if arguments.variant else None
        for home, data in run.plain[name].items():
            if only in (None, home):
                print(freeze(data, f"{name} of run {run.name}" + (f", variant {home}" if home else "")))


def _launch(arguments: argparse.Namespace) -> int:
    from circuitmill.launch import launch

    ending = launch(arguments.ranked, per_node=arguments.per_node, threads=arguments.threads)
    if ending.text:
        print(f"circuitmill launch: {ending.text}", file=sys.stderr)
    return ending.code


def _export(arguments: argparse.Namespace) -> None:
    from circuitmill.stores.manifest import load_manifest
    from circuitmill.stores.transcoders import MODEL, export_clt

    export_clt(load_manifest(arguments.train, "train").folder / MODEL, arguments.out)
    print(arguments.out)


def _verify(arguments: argparse.Namespace) -> int:
    from circuitmill.stores.verify import verify

    report = verify(arguments.path)
    print(report.text())
    return 1 if report.problems else 0


def _serve(arguments: argparse.Namespace) -> None:
    from circuitmill.viz.serve import serve

    serve(arguments.folder, arguments.port)


def _summary(arguments: argparse.Namespace) -> None:
    from circuitmill.errors import StoreError
    from circuitmill.stores.manifest import NAME
    from circuitmill.viz.summary import headline, study

    paths = sorted(arguments.folder.glob(f"*/report/{NAME}"))
    if not paths:
        raise StoreError(
            "a finished report", found="none", where=arguments.folder / "<variant>/report", fix="run the workflow"
        )
    for path in paths:
        print(headline(path, arguments.elapsed))
    # the reports of all variants hold the same study, if they have one
    if compared := next(filter(None, map(study, paths)), None):
        print(compared)
