"""MLP inputs and outputs of every layer, one job per shard, and the statistics that training normalises with.

Inputs:  results/<run>/config/cache.yaml, results/<run>/tokenize/manifest.json,
         results/<run>/calibrate/manifest.json,
         results/<run>/toyworld/manifest.json (embedded model only)
Outputs: results/<run>/cache/shard/<shard>/manifest.json; beside it activations.zarr
         results/<run>/cache/manifest.json; beside it normalization.safetensors
"""


rule cache_shard:
    """Run the language model over one slice of the sequences and store what its MLPs read and write."""
    input:
        config=frozen("cache"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        calibrate=upstream("calibrate"),
    output:
        manifest=unit_manifest("cache"),
    log:
        log_file("cache", unit=True),
    benchmark:
        benchmark_file("cache", unit=True)
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        revision=stage("cache").revision,
        out=beside,
    shell:
        "python -m circuitmill cache --shard {wildcards.shard} --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --calibrate {input.calibrate} --out {params.out} 2>&1 | tee {log} >&2"


rule run_cache:
    """Check that every shard is there and merge their statistics."""
    input:
        config=frozen("cache"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        calibrate=upstream("calibrate"),
        shards=unit_manifests("cache"),
    output:
        manifest=manifest("cache"),
    log:
        log_file("cache"),
    benchmark:
        benchmark_file("cache")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        revision=stage("cache").revision,
        out=beside,
    shell:
        "python -m circuitmill cache --config {input.config} --toyworld {input.toyworld} --tokenize {input.tokenize}"
        " --calibrate {input.calibrate} --out {params.out} 2>&1 | tee {log} >&2"
