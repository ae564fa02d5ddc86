"""What every feature fires on and promotes, one job per block of features.

Inputs:  results/<run>/<variant>/config/features.yaml, the manifests of tokenize, cache, train,
         and of toyworld (embedded model only)
Outputs: results/<run>/<variant>/features/block/<block>/manifest.json; beside it features.parquet, windows.parquet
         results/<run>/<variant>/features/manifest.json; beside it index.parquet
"""


rule features_block:
    """Collect windows, densities and logit weights of one block of features."""
    input:
        config=frozen("features"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        cache=upstream("cache"),
        train=upstream("train"),
    output:
        manifest=unit_manifest("features"),
    log:
        log_file("features", unit=True),
    benchmark:
        benchmark_file("features", unit=True)
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("features_block")
    resources:
        **asks("features_block", mem_mb=4000, runtime=120),
    params:
        revision=stage("features").revision,
        out=beside,
    shell:
        "python -m circuitmill features --block {wildcards.block} --config {input.config}"
        " --toyworld {input.toyworld} --tokenize {input.tokenize} --cache {input.cache} --train {input.train}"
        " --out {params.out} 2>&1 | tee {log} >&2"


rule run_features:
    """Check that the blocks cover every feature once and index them."""
    input:
        config=frozen("features"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        cache=upstream("cache"),
        train=upstream("train"),
        blocks=unit_manifests("features"),
    output:
        manifest=manifest("features"),
    log:
        log_file("features"),
    benchmark:
        benchmark_file("features")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_features")
    resources:
        **asks("run_features", mem_mb=2000, runtime=30),
    params:
        revision=stage("features").revision,
        out=beside,
    shell:
        "python -m circuitmill features --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --cache {input.cache} --train {input.train} --out {params.out}"
        " 2>&1 | tee {log} >&2"
