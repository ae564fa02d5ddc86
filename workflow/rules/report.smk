"""The browsable page of one variant; works from disk and without network.

Inputs:  results/<run>/<variant>/config/report.yaml, the manifests of every stage before,
         and of evaluate of the run's other variants; if variants differ in a shared stage also, of all variants, the
         manifests of that stage, train, evaluate and attribute
Outputs: results/<run>/<variant>/report/manifest.json; beside it index.html, tables.html
"""


rule run_report:
    """Write the page."""
    input:
        config=frozen("report"),
        toyworld=upstream("toyworld"),
        tokenize=upstream("tokenize"),
        cache=upstream("cache"),
        train=upstream("train"),
        evaluate=upstream("evaluate"),
        features=upstream("features"),
        interpret=upstream("interpret"),
        attribute=upstream("attribute"),
        siblings=siblings("evaluate"),
        study=study(),
    output:
        manifest=manifest("report"),
        tables=shown("report", f"{folder('report')}/tables.html", table="Figures"),
    log:
        log_file("report"),
    benchmark:
        benchmark_file("report")
    conda:
        "../../envs/core.yaml"
    envmodules:
        *modules(),
    threads: cpus("run_report")
    resources:
        **asks("run_report", mem_mb=3000, runtime=30),
    params:
        revision=stage("report").revision,
        out=beside,
        benchmarks=f"{RESULTS}/benchmarks",
    shell:
        "python -m circuitmill report --config {input.config} --toyworld {input.toyworld}"
        " --tokenize {input.tokenize} --cache {input.cache} --train {input.train} --evaluate {input.evaluate}"
        " --features {input.features} --interpret {input.interpret} --attribute {input.attribute}"
        " --siblings {input.siblings} --study {input.study} --benchmarks {params.benchmarks}"
        " --out {params.out} 2>&1 | tee {log} >&2"
