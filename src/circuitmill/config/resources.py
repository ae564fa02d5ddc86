"""What a job has, read from its resources by Snakemake's names."""

import re
from collections.abc import Mapping
from typing import Any

_GPUS = re.compile(r"\bgpu(:[a-zA-Z][\w.]*)?(:(?P<number>\d+))?(,|$)")
"""In Slurm's word for what a job has on each node: gpu, gpu:4, gpu:a100:4."""


def gpus_per_node(resources: Mapping[str, Any]) -> int:
    """GPUs that a job has on each of its nodes.

    Args:
        resources: Of the job: gpu on one node, gres on several.

    >>> gpus_per_node({"gpu": 2}), gpus_per_node({"gres": "gpu:a100:4", "nodes": 2}), gpus_per_node({"mem_mb": 1000})
    (2, 4, 0)
    """
    found = _GPUS.search(str(resources.get("gres", "")))
    return resources.get("gpu", 0) if found is None else int(found["number"] or 1)


def gpus(resources: Mapping[str, Any]) -> int:
    """GPUs that a job has in all.

    Args:
        resources: Of the job: gpu is the number in all, gres is of each node.

    >>> gpus({"gpu": 2}), gpus({"gres": "gpu:a100:4", "nodes": 2}), gpus({"gres": "gpu"})
    (2, 8, 1)
    """
    in_gres = _GPUS.search(str(resources.get("gres", ""))) is not None
    return gpus_per_node(resources) * (resources.get("nodes", 1) if in_gres else 1)
