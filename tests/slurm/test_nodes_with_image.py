"""Jobs of Slurm in the image: Snakemake starts it on the node, or, for a training on two, srun on each of them."""

from pathlib import Path

import pytest
from tests.containers.conftest import Image
from tests.slurm.checkouts import Checkout, copied, same_model
from tests.slurm.conftest import Slurm

pytestmark = pytest.mark.slow


def test_shards_are_made_and_two_nodes_train_in_the_image(image: Image, slurm: Slurm, tiny_run: Path, tmp_path: Path):
    rules = {"run_train": {"nodes": 2, "gpus": 1, "mem_mb": 1500}}
    made = copied(tiny_run, tmp_path / "c", {"gpu_partition": "gpu", "rules": rules}, "cache", "main/train")
    (made.folder / "containers").mkdir()
    (made.folder / "containers/circuitmill.sif").symlink_to(image.sif)
    run = made.start("train", "--software-deployment-method", "apptainer")

    def in_the_image() -> bool:
        ranks = [said for said in made.processes("circuitmill", "train").values() if "launch" not in said]
        return len(ranks) == 2 and all(said[0] == "/opt/venv/bin/python" for said in ranks)

    run.until(in_the_image, "two ranks in the image", poll=0.01)
    run.finish()
    assert "2 ranks" in (made.results / "logs/main/train.log").read_text()
    here = Checkout(tiny_run, "tiny")
    assert here.manifests("cache") == made.manifests("cache")
    same_model(here, made)
