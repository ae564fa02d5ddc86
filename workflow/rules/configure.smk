"""Freeze each stage's part of the configuration.

Outputs: results/<run>/config/<stage>.yaml of the stages that all variants share,
         results/<run>/<variant>/config/<stage>.yaml of the others.

A file is written again only when its own text would change, so that a change of train.lr reruns train and what
follows, and nothing before.
"""


rule configure:
    """Write one stage's frozen configuration."""
    output:
        f"{RESULTS}/{{scope}}config/{{stage}}.yaml",
    log:
        f"{RESULTS}/logs/{{scope}}config/{{stage}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scope}}config/{{stage}}.jsonl"
    localrule: True
    threads: 1
    resources:
        mem_mb=100,
        runtime=1,
    params:
        text=frozen_text,
    shell:
        "printf %s {params.text:q} > {output:q} 2> {log}"
