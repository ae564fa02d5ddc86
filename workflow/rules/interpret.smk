"""An explanation and its score for every feature, one job per block of features.

Inputs:  results/<run>/<variant>/config/interpret.yaml, results/<run>/<variant>/features/manifest.json
Outputs: results/<run>/<variant>/interpret/block/<block>/manifest.json; beside it explanations.parquet
         results/<run>/<variant>/interpret/manifest.json; beside it summary.json
"""


rule interpret_block:
    """Explain the features of one block and score the explanations on held-out windows."""
    input:
        config=frozen("interpret"),
        features=upstream("features"),
    output:
        manifest=unit_manifest("interpret"),
    log:
        log_file("interpret", unit=True),
    benchmark:
        benchmark_file("interpret", unit=True)
    conda:
        "../../envs/interpret.yaml"
    envmodules:
        *modules(),
    threads: cpus("interpret_block")
    resources:
        **asks("interpret_block", mem_mb=3000, runtime=240),
    params:
        revision=stage("interpret").revision,
        out=beside,
    shell:
        "python -m circuitmill interpret --block {wildcards.block} --config {input.config}"
        " --features {input.features} --out {params.out} 2>&1 | tee {log} >&2"


rule run_interpret:
    """Check that every feature has its row and sum the scores up."""
    input:
        config=frozen("interpret"),
        features=upstream("features"),
        blocks=unit_manifests("interpret"),
    output:
        manifest=manifest("interpret"),
    log:
        log_file("interpret"),
    benchmark:
        benchmark_file("interpret")
    conda:
        "../../envs/interpret.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_interpret")
    resources:
        **asks("run_interpret", mem_mb=2000, runtime=30),
    params:
        revision=stage("interpret").revision,
        out=beside,
    shell:
        "python -m circuitmill interpret --config {input.config} --features {input.features} --out {params.out}"
        " 2>&1 | tee {log} >&2"
