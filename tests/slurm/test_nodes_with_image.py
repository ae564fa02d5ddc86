"""Jobs of Slurm in the image: Snakemake starts it on the node, or, for a training on two, srun on each of them."""

from pathlib import Path

import psutil
import pytest
from tests.containers.conftest import Image
from tests.slurm.checkouts import Checkout, copied, same_model
from tests.slurm.conftest import Slurm

from circuitmill.config.deployment import EXPECTED, revisions

pytestmark = pytest.mark.slow


def test_shards_are_made_and_two_nodes_train_in_the_image(image: Image, slurm: Slurm, tiny_run: Path, tmp_path: Path):
    rules = {"run_train": {"nodes": 2, "gpus": 1, "mem_mb": 1500}}
    made = copied(tiny_run, tmp_path / "c", {"gpu_partition": "gpu", "rules": rules}, "cache", "main/train")
    (made.folder / "containers").mkdir()
    (made.folder / "containers/circuitmill.sif").symlink_to(image.sif)
    run = made.start("train", "--software-deployment-method", "apptainer")

    def in_the_image() -> list[int]:
        found = made.processes("circuitmill", "train").items()
        ranks = [pid for pid, said in found if "launch" not in said and said[0] == "/opt/venv/bin/python"]
        return ranks if len(ranks) == 2 else []

    ranks = run.until(in_the_image, "two ranks in the image", poll=0.01)
    # what their launchers have compared with the image's own
    assert {psutil.Process(pid).environ().get(EXPECTED) for pid in ranks} == {revisions()}
    run.finish()
    assert "2 ranks" in (made.results / "logs/main/train.log").read_text()
    here = Checkout(tiny_run, "tiny")
    assert here.manifests("cache") == made.manifests("cache")
    same_model(here, made)
