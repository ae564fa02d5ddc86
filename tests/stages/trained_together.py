"""Trainings that the same ranks make one after the other, as `circuitmill train` makes each.

torchrun ... -m tests.stages.trained_together CONFIG.yaml OUT BASE|- [CONFIG.yaml OUT BASE|- ...] tokenize=... cache=...
"""

import sys
from pathlib import Path

from circuitmill import distributed
from circuitmill.config.compose import read_frozen
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.stages import train as stage


def main(arguments: list[str]) -> None:
    upstreams = {name: Path(path) for name, _, path in (one.partition("=") for one in arguments if "=" in one)}
    jobs = [one for one in arguments if "=" not in one]
    distributed.init()
    for config, out, base in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        cfg = decode(TrainConfig, read_frozen(Path(config)), "train")
        stage.run(cfg, **upstreams, base=None if base == "-" else Path(base), out=Path(out))
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
