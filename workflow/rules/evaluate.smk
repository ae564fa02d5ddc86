"""Fit, sparsity, the replacement model and task accuracy, on held-out tokens.

Inputs:  results/<run>/<variant>/config/evaluate.yaml, the manifests of tokenize, cache, train,
         and of toyworld (embedded model only)
Outputs: results/<run>/<variant>/evaluate/manifest.json; beside it evaluation.json, *.parquet, plots/
"""


rule run_evaluate:
    """Measure the trained transcoder."""
    input:
        config=frozen("evaluate"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        cache=upstream("cache"),
        train=upstream("train"),
    output:
        manifest=manifest("evaluate"),
        ev=shown("evaluate", f"{folder('evaluate')}/plots/explained_variance.svg", figure="Explained variance"),
        l0=shown("evaluate", f"{folder('evaluate')}/plots/l0.svg", figure="L0"),
        density=shown("evaluate", f"{folder('evaluate')}/plots/density.svg", figure="Density"),
    log:
        log_file("evaluate"),
    benchmark:
        benchmark_file("evaluate")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_evaluate")
    resources:
        **asks("run_evaluate", mem_mb=4000, runtime=120),
    params:
        revision=stage("evaluate").revision,
        out=beside,
    shell:
        "python -m circuitmill evaluate --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --cache {input.cache} --train {input.train} --out {params.out}"
        " 2>&1 | tee {log} >&2"
