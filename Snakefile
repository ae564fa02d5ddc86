"""circuitmill: text goes in, attribution graphs come out.

snakemake                                       the demo, on this machine
snakemake train --config run=gpt2               one stage of another run and what it needs
snakemake --config run=demo set="train.lr=1e-3" with overrides
snakemake --profile profiles/slurm all          on a cluster
"""

from snakemake.utils import min_version

min_version("9.19")


include: "workflow/rules/common.smk"
include: "workflow/rules/where.smk"


container: IMAGE


report: "workflow/report/workflow.rst"


# The first rule is what a bare `snakemake` makes.
rule all:
    """The report of every variant, and everything it is made from."""
    input:
        [targets(name) for name in RUN.stage_names()],
    localrule: True


include: "workflow/rules/configure.smk"


if RUN.has_toyworld:

    include: "workflow/rules/toyworld.smk"


include: "workflow/rules/tokenize.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/cache.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/interpret.smk"
include: "workflow/rules/attribute.smk"
include: "workflow/rules/report.smk"


# Every stage's name is a target: `snakemake attribute` makes the graphs of all variants.
for name in RUN.stage_names():

    rule:
        name:
            name
        input:
            targets(name),
        localrule: True
