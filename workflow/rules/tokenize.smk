"""Documents become fixed-length token sequences, split into train and held-out by document.

Inputs:  results/<run>/config/tokenize.yaml, results/<run>/toyworld/manifest.json (embedded model only)
Outputs: results/<run>/tokenize/manifest.json; beside it train/, heldout/ and documents-*.parquet
"""


rule run_tokenize:
    """Tokenize and pack the corpus."""
    input:
        config=frozen("tokenize"),
        toyworld=upstream("toyworld"),
    output:
        manifest=manifest("tokenize"),
    log:
        log_file("tokenize"),
    benchmark:
        benchmark_file("tokenize")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_tokenize", 2)
    resources:
        **asks("run_tokenize", mem_mb=4000, runtime=240, threads=2),
    params:
        revision=stage("tokenize").revision,
        out=beside,
    shell:
        "python -m circuitmill tokenize --config {input.config} --toyworld {input.toyworld} --out {params.out}"
        " 2>&1 | tee {log} >&2"
