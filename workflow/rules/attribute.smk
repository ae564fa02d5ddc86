"""An attribution graph per prompt, in circuit-tracer's format; none for a transcoder that cannot be traced.

Inputs:  results/<run>/<variant>/config/attribute.yaml, the manifests of tokenize, train, features, interpret,
         and of toyworld (embedded model only)
Outputs: results/<run>/<variant>/attribute/prompt/<prompt>/manifest.json; beside it graph.json, scores.json
         results/<run>/<variant>/attribute/manifest.json; beside it graph-metadata.json, graph_data/, features/,
         summary.json
"""


rule attribute_prompt:
    """Trace, prune and score the graph of one prompt."""
    input:
        config=frozen("attribute"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        train=upstream("train"),
        features=upstream("features"),
        interpret=upstream("interpret"),
    output:
        manifest=unit_manifest("attribute"),
        graph=shown("attribute", f"{unit_folder('attribute')}/graph.json", prompt="{prompt}"),
    log:
        log_file("attribute", unit=True),
    benchmark:
        benchmark_file("attribute", unit=True)
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("attribute_prompt")
    resources:
        **asks("attribute_prompt", mem_mb=4000, runtime=60),
    params:
        revision=stage("attribute").revision,
        out=beside,
    shell:
        "python -m circuitmill attribute --prompt {wildcards.prompt} --config {input.config}"
        " --toyworld {input.toyworld} --tokenize {input.tokenize} --train {input.train}"
        " --features {input.features} --interpret {input.interpret} --out {params.out} 2>&1 | tee {log} >&2"


rule run_attribute:
    """Write the index of the graphs, the pages of their features and what the graphs say about known circuits."""
    input:
        config=frozen("attribute"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        train=upstream("train"),
        features=upstream("features"),
        interpret=upstream("interpret"),
        prompts=unit_manifests("attribute"),
    output:
        manifest=manifest("attribute"),
    log:
        log_file("attribute"),
    benchmark:
        benchmark_file("attribute")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_attribute")
    resources:
        **asks("run_attribute", mem_mb=3000, runtime=30),
    params:
        revision=stage("attribute").revision,
        out=beside,
    shell:
        "python -m circuitmill attribute --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --train {input.train} --features {input.features}"
        " --interpret {input.interpret} --out {params.out} 2>&1 | tee {log} >&2"
