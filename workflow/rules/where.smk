"""Where it runs: what jobs ask for there, and a note of this controller for `circuitmill status`, `cancel` and `resume`.

Inputs:  the site file that the profile names, if it names one
Outputs: results/<run>/logs/controllers.jsonl, a line per call of snakemake that starts jobs
"""

import re
import signal
import sys

import circuitmill
from circuitmill.config.deployment import job_prefix
from circuitmill.config.site import full_groups, gpus_here, growing, load_site, memory_here_mb
from circuitmill.controllers import record
from circuitmill.stages.cost import short_of_disk
from snakemake.logging import logger

SITE = load_site(config.get("where"))

# Slurm warns a training before its time is up, and with it the Snakemake of its job, which must not end of it; an
# ignored signal stays ignored in what it starts, but for the training, which listens.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

GPUS = gpus_here() if SITE is not None and SITE.scheduler == "local" else ()

METHODS = {method.name for method in workflow.deployment_settings.deployment_method}

shell.prefix(
    job_prefix(
        METHODS,
        python=Path(sys.executable),
        source=Path(circuitmill.__file__).parents[1],
        modules=() if SITE is None else SITE.modules,
    )
    + (f"export CIRCUITMILL_GPUS={','.join(GPUS)} CIRCUITMILL_RULE_GPUS={SITE.shares(len(GPUS))}; " if GPUS else "")
)

if GPUS:
    # Jobs take GPUs and memory of this machine as long as there are any; a command line may give them less.
    for name, amount in (("gpu", len(GPUS)), ("mem_mb", memory_here_mb())):
        if name not in workflow.global_resources:
            workflow.register_resource(name, amount)


def asks(name, mem_mb, runtime, threads=1, times=1):
    """Resources of a rule: memory in MB and time limit in minutes, both growing with the attempt; the rest by the site."""
    if SITE is None:
        return {"mem_mb": growing(mem_mb), "runtime": growing(runtime * times)}
    return SITE.resources(name, mem_mb=mem_mb, runtime=runtime, threads=threads, times=times, gpus_here=len(GPUS))


def cpus(name, threads=1):
    """Threads of a rule."""
    return threads if SITE is None else SITE.cpus(name, threads)


def modules():
    """Environment modules of every rule."""
    return SITE.modules if SITE is not None else ()


def several_nodes(name):
    """Whether the jobs of a rule have several nodes."""
    return SITE is not None and SITE.rule(name).nodes > 1


def image(name):
    """Container of a rule; none if its steps start behind srun, which is not in the image."""
    return None if several_nodes(name) else IMAGE


def image_behind_srun(name):
    """Container and apptainer's arguments of a rule's steps; nothing if they start inside, or there is no container."""
    behind = several_nodes(name) and "APPTAINER" in METHODS
    return (IMAGE, workflow.deployment_settings.apptainer_args) if behind else ()


def together(name):
    """Number of units of a stage in one job, and a wildcard's pattern for what their names have in front."""
    size = SITE.shards_per_job
    groups = full_groups([cfg.units() for cfg in RUN.stages[name].values()], size)
    return [f"{number:0{len(str(size)) - 1}d}" for number in range(size)], "|".join(groups) or "$."


def first(path):
    """A path of one unit as that of several, which is named after what their names have in front."""
    return re.sub(r"\{shard\}", "{first}", path)


def units_made(wildcards, output):
    """Params function: the units that a job makes."""
    return [Path(path).name for path in beside(wildcards, output)]


onstart:
    record(Path(RESULTS), log[0])
    if shortage := short_of_disk(RUN, Path(RESULTS)):
        logger.warning(shortage)
