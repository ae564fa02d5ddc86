"""Start a command as several ranks: on this machine, or on every node of a Slurm step.

    circuitmill launch --per-node 4 train --config results/demo/main/config/train.yaml ...
    srun -N 2 -n 2 --gres gpu:4 python -m circuitmill launch --per-node 4 train ...

It is torchrun's agent inside, with other ways of ending. SIGTERM, SIGINT and SIGUSR1 go on to the ranks, which decide;
their exit codes are kept apart, so that "stopped after a checkpoint" (75) is one. When a rank fails the others get time
to say what they know of it. Nothing is ever started again here: that is the scheduler's part.
"""

import itertools
import logging
import os
import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitmill import gpus
from circuitmill.config.deployment import check_revisions
from circuitmill.config.resources import gpus_per_node
from circuitmill.errors import ConfigError

if TYPE_CHECKING:
    from circuitmill.agent import Ending

STOP_S = 120.0
"""Seconds that ranks have to write a checkpoint and leave after SIGTERM or SIGINT, or once one of them has left so."""
LAST_WORDS_S = 45.0
"""Seconds that ranks have to leave by themselves once one has failed; longer than they need to miss a heartbeat."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """This node among those of a group."""

    nodes: int = 1
    node: int = 0
    master: str = ""
    """Host of node 0."""
    port: int = 0
    """On that host."""


def place(env: Mapping[str, str]) -> Place:
    """Where this process is: alone, or in a Slurm step that has one launch per node.

    Args:
        env: The environment's variables.

    Raises:
        ConfigError: several nodes, but what Slurm says of them is missing or does not fit.
    """
    key = next((k for k in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") if k in env), None)
    nodes = 1 if key is None else _number(env, key)
    if nodes == 1:
        return Place()
    _number(env, "SLURM_STEP_ID")  # a batch script has all the others
    tasks = _number(env, "SLURM_STEP_NUM_TASKS", default=nodes)
    if tasks != nodes:
        raise _slurm_error(f"one task per node, that is {nodes}", tasks, "SLURM_STEP_NUM_TASKS", nodes)
    node = _number(env, "SLURM_NODEID")
    if node >= nodes:
        raise _slurm_error(f"a number below {nodes}", node, "SLURM_NODEID", nodes)
    listed = next((k for k in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if k in env), None)
    if listed is None:
        raise _slurm_error("a list of nodes", "no variable", "SLURM_STEP_NODELIST", nodes)
    return Place(nodes, node, _hosts(env[listed], listed, nodes)[0], 20000 + _number(env, "SLURM_JOB_ID") % 20000)


def _slurm_error(expected: str, found: object, where: str, nodes: int) -> ConfigError:
    return ConfigError(
        expected,
        found=found,
        where=where,
        fix=f"start it with srun -N {nodes} -n {nodes} python -m circuitmill launch ...",
    )


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    if key not in env and default is not None:
        return default
    text = env.get(key, "no variable")
    if not text.isdecimal():
        raise ConfigError(
            "a number, from srun", found=text, where=key, fix="start it with srun, or unset Slurm's variables"
        )
    return int(text)


def hosts(listed: str) -> list[str]:
    """The nodes of one of Slurm's lists, in its order: what `scontrol show hostnames` prints, also where it is not.

    Raises:
        ValueError: not such a list.

    >>> hosts("n7,gpu[01-03,10]-a[1-2]")[:4]
    ['n7', 'gpu01-a1', 'gpu01-a2', 'gpu02-a1']
    """
    if not re.fullmatch(r"(?:[\w.-]+|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]|,)+", listed):
        raise ValueError(f"{listed!r} is no list of nodes")
    found = []
    for name in re.findall(r"(?:\[[^]]*\]|[^,[])+", listed):
        parts = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in re.findall(r"\[[^]]*\]|[^[]+", name)]
        found += ["".join(chosen) for chosen in itertools.product(*parts)]
    return found


def _numbers(ranges: str) -> list[str]:
    """Of 01-03,10: each with as many digits as the first of its range."""
    pairs = [(first, last or first) for first, _, last in (one.partition("-") for one in ranges.split(","))]
    return [str(number).zfill(len(low)) for low, high in pairs for number in range(int(low), int(high) + 1)]


def _hosts(listed: str, key: str, nodes: int) -> list[str]:
    try:
        found = hosts(listed)
    except ValueError as error:
        raise _slurm_error("a list of nodes such as n[7-8]", listed, key, nodes) from error
    if len(found) != nodes:
        raise _slurm_error(f"{nodes} nodes", f"{len(found)}: {' '.join(found)}", f"{key}={listed}", nodes)
    return found


def ranks_per_node(resources: Mapping[str, Any]) -> int:
    """One per GPU that a job has on each of its nodes, or one where there is none.

    Args:
        resources: Of the job, by Snakemake's names: gpu on one node, gres on several.
    """
    return max(1, gpus_per_node(resources))


def srun(resources: Mapping[str, Any], image: str = "", arguments: str = "") -> str:
    """What comes before `launch` in a job: the start of a step on each of several nodes, or nothing.

    Everything is said explicitly, because Snakemake takes Slurm's variables away from a job. srun is not in the image,
    so the container starts behind it, once on each node.

    Args:
        resources: Of the job, by Snakemake's names.
        image: Container to run in; empty for none.
        arguments: Of apptainer exec.
    """
    nodes, gres = resources.get("nodes", 1), resources.get("gres")
    if nodes == 1:
        return ""
    cpus = resources.get("cpus_per_task", 1)
    step = f"srun -N {nodes} -n {nodes} --cpus-per-task={cpus}" + (f" --gres={gres}" if gres else "")
    if not image:
        return step
    return " ".join(
        filter(None, [step, "apptainer exec --home", shlex.quote(str(Path.cwd())), arguments, shlex.quote(image)])
    )


def torchrun_arguments(here: Place, per_node: int, command: Sequence[str], module: str = "circuitmill") -> list[str]:
    """What torchrun would be called with."""
    if here.nodes == 1:
        # the agent's own store, at any free port; a name of this host need not resolve
        group = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
        group += ["--local-addr", "localhost"]
    else:
        group = ["--nnodes", str(here.nodes), "--node-rank", str(here.node)]
        group += ["--master-addr", here.master, "--master-port", str(here.port)]
    # torchrun's own handling of the others would forget how the ranks ended
    ending = ["--max-restarts", "0", "--signals-to-handle", "SIGHUP,SIGQUIT"]
    return [*group, "--nproc-per-node", str(per_node), *ending, "-m", module, *command]


def launch(
    command: Sequence[str],
    *,
    per_node: int | None = None,
    threads: int | None = None,
    module: str = "circuitmill",
    env: Mapping[str, str] = os.environ,
    stop_s: float = STOP_S,
    last_words_s: float = LAST_WORDS_S,
) -> "Ending":
    """Run a subcommand of circuitmill as ranks and wait for them.

    Args:
        command: The subcommand with its arguments.
        per_node: Ranks per node; one per GPU of this node, or one where there is none, if not given.
        threads: Of this node, which its ranks share out; OMP_NUM_THREADS, or 1 each of several, if not given.
        module: What is run with the command, by every rank.
        env: The environment's variables, for Slurm's.
        stop_s: Seconds that ranks have to leave after a request to stop.
        last_words_s: Seconds that ranks have to leave after one has failed.

    Raises:
        ConfigError: there is no command, the job expects another image, or Slurm's variables do not say where this
            node is.
    """
    if not command or command[0].startswith("-"):
        raise ConfigError(
            "a subcommand to run", found=" ".join(command) or "none", where="launch", fix="circuitmill launch train ..."
        )
    if per_node is not None and per_node < 1:
        raise ConfigError("at least 1 rank", found=per_node, where="--per-node", fix="correct the number")
    check_revisions(env)
    here = place(env)
    gpus.lease(f"run_{command[0]}")
    from torch import cuda

    if per_node is None:
        per_node = max(1, cuda.device_count())
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // per_node))
    elif per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # torchrun's rule: threads of many ranks on one machine would get into each other's way
        os.environ["OMP_NUM_THREADS"] = "1"
        _log.info("OMP_NUM_THREADS=1 for each of %d ranks; set the variable for another number", per_node)
    from circuitmill import agent

    return agent.run(torchrun_arguments(here, per_node, command, module), stop_s=stop_s, last_words_s=last_words_s)
