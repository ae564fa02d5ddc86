"""Which run this is, and where its files are. Every path of the workflow is made here.

The heads of the other files name the paths of a run whose variants agree in toyworld, tokenize, calibrate and cache.
Where they differ, a stage's folder is below that of the first variant that uses it: results/<run>/<variant>/<stage>/.
"""

import shlex
from pathlib import Path

from circuitmill.config.compose import freeze, load_run
from circuitmill.pipeline import OPTIONAL_UPSTREAM, STAGES, stage

RUN = load_run(config.get("run", "demo"), shlex.split(config.get("set", "")))
RESULTS = f"results/{RUN.name}"
IMAGE = "containers/circuitmill.sif"


wildcard_constraints:
    variant="|".join(RUN.variants),
    scope="|".join(["", *(f"{variant}/" for variant in RUN.variants)]),


def folder(name):
    """Folder of a stage; with the wildcard {variant} if variants differ in it, and for train and what follows."""
    return f"{RESULTS}/{name}" if "" in RUN.stages[name] else f"{RESULTS}/{{variant}}/{name}"


def unit_folder(name):
    """Folder of one unit of a stage, with the unit as a wildcard."""
    return f"{folder(name)}/{stage(name).unit}/{{{stage(name).unit}}}"


def manifest(name):
    """The one output of a stage."""
    return f"{folder(name)}/manifest.json"


def unit_manifest(name):
    """The one output of a unit."""
    return f"{unit_folder(name)}/manifest.json"


def upstream(name):
    """Input: the output of an earlier stage that this variant uses. Absent if this run does not have the stage."""
    if name not in RUN.stages:
        return []
    if "" in RUN.stages[name]:
        return manifest(name)
    return lambda wildcards: manifest(name).format(variant=RUN.home(name, wildcards.variant))


def base():
    """Input function: the training that a variant's `train.base` names. Absent if there is none."""
    return lambda wildcards: [f"results/{name}/train/manifest.json" for name in [RUN.base(wildcards.variant)] if name]


def unit_manifests(name):
    """Input function: the outputs of all units of a stage, known from the configuration alone."""
    return lambda wildcards: expand(
        unit_manifest(name),
        variant=getattr(wildcards, "variant", ""),
        **{stage(name).unit: RUN.config(name, getattr(wildcards, "variant", "")).units()},
    )


def frozen(name):
    """The frozen configuration of a stage."""
    return folder(name).removesuffix(name) + f"config/{name}.yaml"


def frozen_text(wildcards):
    """Content of a frozen configuration."""
    variant = wildcards.scope.rstrip("/")
    heading = f"{wildcards.stage} of run {RUN.name}" + (f", variant {variant}" if variant else "")
    return freeze(RUN.plain[wildcards.stage][variant], heading)


def log_file(name, unit=False):
    """Log of a stage or of one of its units."""
    return (unit_folder(name) if unit else folder(name)).replace(RESULTS, f"{RESULTS}/logs", 1) + ".log"


def benchmark_file(name, unit=False):
    """Time and memory of a stage or of one of its units, measured by snakemake."""
    return (unit_folder(name) if unit else folder(name)).replace(RESULTS, f"{RESULTS}/benchmarks", 1) + ".jsonl"


def beside(wildcards, output):
    """Params function: the folders of the manifests, which belong to the job."""
    return [str(Path(path).parent) for path in output if path.endswith("manifest.json")]


def shown(name, file, **labels):
    """An output that `snakemake --report` shows, under its stage and with the caption of its name; labels are columns."""
    caption = f"../report/{Path(file).stem}.rst"
    return report(file, caption=caption, category=name, labels={"variant": "{variant}", **labels})


def targets(name):
    """The outputs of a stage and of its units, for all variants, once each.

    Units are listed because snakemake makes a missing intermediate file again only if it is asked for.
    """
    files = expand(manifest(name), variant=RUN.stages[name])
    unit = stage(name).unit
    for home, cfg in RUN.stages[name].items() if unit else ():
        patterns = [unit_manifest(name)] + [f"{unit_folder(name)}/graph.json"] * (name == "attribute")
        files += expand(patterns, variant=home, **{unit: cfg.units()})
    return files


def siblings(name):
    """Input function: the outputs of a stage for the variants other than this one."""
    return lambda wildcards: expand(manifest(name), variant=[v for v in RUN.variants if v != wildcards.variant])


def study():
    """Input: what compares all variants of a run if they differ in a shared stage; nothing if they do not."""
    names = [*RUN.divided(), "train", "evaluate", "attribute"] if RUN.divided() else []
    return [path for name in names for path in expand(manifest(name), variant=RUN.stages[name])]
