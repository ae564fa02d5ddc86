"""The embedded corpus and language model with known circuits. Only runs with model.source = toyworld have it.

Inputs:  results/<run>/config/toyworld.yaml
Outputs: results/<run>/toyworld/manifest.json; beside it corpus/, model/, truth.json
"""


rule run_toyworld:
    """Generate the corpus, train tokenizer and language model, write down what is true of them."""
    input:
        config=frozen("toyworld"),
    output:
        manifest=manifest("toyworld"),
    log:
        log_file("toyworld"),
    benchmark:
        benchmark_file("toyworld")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_toyworld", 2)
    resources:
        **asks("run_toyworld", mem_mb=3000, runtime=60, threads=2),
    params:
        revision=stage("toyworld").revision,
        out=beside,
    shell:
        "python -m circuitmill toyworld --config {input.config} --out {params.out} 2>&1 | tee {log} >&2"
