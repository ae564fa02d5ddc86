"""The cross-layer transcoder.

Inputs:  results/<run>/<variant>/config/train.yaml, the manifests of tokenize, cache,
         of toyworld (embedded model only), and of the training that train.base names, if it does
Outputs: results/<run>/<variant>/train/manifest.json; beside it model/, metrics.jsonl, checkpoints/
"""

from circuitmill.launch import ranks_per_node, srun


rule run_train:
    """Train, always through the launcher: a process per GPU, or one on the CPU; on one node or, in Slurm, several."""
    input:
        config=frozen("train"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        cache=upstream("cache"),
        base=base(),
    output:
        manifest=manifest("train"),
    log:
        log_file("train"),
    benchmark:
        benchmark_file("train")
    conda:
        "../../envs/core.yaml"
    container:
        image("run_train")
    envmodules:
        *modules(),
    threads: cpus("run_train", 2)
    resources:
        **asks("run_train", mem_mb=6000, runtime=1440, threads=2),
    params:
        revision=stage("train").revision,
        out=beside,
        ranks=lambda wildcards, resources: ranks_per_node(resources),
        srun=lambda wildcards, resources: srun(resources, *image_behind_srun("run_train")),
    shell:
        "{params.srun} python -m circuitmill launch --per-node {params.ranks} --threads {threads} train"
        " --config {input.config} --toyworld {input.toyworld} --tokenize {input.tokenize} --cache {input.cache}"
        " --base {input.base} --out {params.out} 2>&1 | tee {log} >&2"
