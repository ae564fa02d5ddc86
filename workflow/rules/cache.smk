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
    envmodules:
        *modules(),
    threads: cpus("cache_shard")
    resources:
        **asks("cache_shard", mem_mb=4000, runtime=240),
    params:
        revision=stage("cache").revision,
        shards=units_made,
        out=beside,
    shell:
        "python -m circuitmill cache --shard {params.shards} --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --calibrate {input.calibrate} --out {params.out} 2>&1 | tee {log} >&2"


if SITE is not None and SITE.shards_per_job > 1:
    ENDS, FULL = together("cache")

    use rule cache_shard as cache_shards with:
        output:
            manifest=[first(unit_manifest("cache")).replace("{first}", f"{{first}}{end}") for end in ENDS],
        log:
            first(log_file("cache", unit=True)),
        benchmark:
            first(benchmark_file("cache", unit=True))
        wildcard_constraints:
            first=FULL,
        resources:
            **asks("cache_shard", mem_mb=4000, runtime=240, times=len(ENDS)),

    ruleorder: cache_shards > cache_shard


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
    envmodules:
        *modules(),
    threads: cpus("run_cache")
    resources:
        **asks("run_cache", mem_mb=2000, runtime=60),
    params:
        revision=stage("cache").revision,
        out=beside,
    shell:
        "python -m circuitmill cache --config {input.config} --toyworld {input.toyworld} --tokenize {input.tokenize}"
        " --calibrate {input.calibrate} --out {params.out} 2>&1 | tee {log} >&2"
