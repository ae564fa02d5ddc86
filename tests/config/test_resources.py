import pytest

from circuitmill.config.resources import gpus, gpus_per_node
from circuitmill.launch import ranks_per_node

RESOURCES = [
    ({}, 0, 0),
    ({"gpu": 0, "mem_mb": 1000}, 0, 0),
    ({"gpu": 4}, 4, 4),
    ({"gpu": 4, "gpu_model": "a100"}, 4, 4),
    ({"gres": "gpu"}, 1, 1),
    ({"gres": "gpu:4", "nodes": 2}, 4, 8),
    ({"gres": "gpu:a100:4", "nodes": 3}, 4, 12),
    ({"gres": "shard:2,gpu:2", "nodes": 1}, 2, 2),
    ({"gres": "gpubank:7"}, 0, 0),
]


@pytest.mark.parametrize(("resources", "each", "all_"), RESOURCES)
def test_gpus_of_a_job(resources: dict, each: int, all_: int):
    assert (gpus_per_node(resources), gpus(resources)) == (each, all_)
    # a rank per GPU, and one where there is none
    assert ranks_per_node(resources) == max(1, each)
