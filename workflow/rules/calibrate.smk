"""What the codecs of the activation store must know of a model: measured once, read by every shard.

Inputs:  results/<run>/config/calibrate.yaml, results/<run>/tokenize/manifest.json,
         results/<run>/toyworld/manifest.json (embedded model only)
Outputs: results/<run>/calibrate/manifest.json; beside it calibration.safetensors
"""


rule run_calibrate:
    """Measure mean, deviation and entropy of every channel on a sample of the train split."""
    input:
        config=frozen("calibrate"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
    output:
        manifest=manifest("calibrate"),
    log:
        log_file("calibrate"),
    benchmark:
        benchmark_file("calibrate")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_calibrate")
    resources:
        **asks("run_calibrate", mem_mb=4000, runtime=60),
    params:
        revision=stage("calibrate").revision,
        out=beside,
    shell:
        "python -m circuitmill calibrate --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --out {params.out} 2>&1 | tee {log} >&2"
