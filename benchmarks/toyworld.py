"""How well does the embedded model learn its world, and where does it keep the two-hop bridge?

Trains one model per seed and prints one JSON line each: accuracies, exchange and ablation figures, seconds.

    python -m benchmarks.toyworld --seeds 0 1 2 --out /somewhere toyworld.transformer.architecture=qwen2

Further arguments are overrides of the demo's configuration. `--keep` leaves the models under `--out`; a seed whose run
was broken off continues there. The acceptance bars are not applied, so nothing is extended: they are printed beside the
figures.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import time
from pathlib import Path

import torch

from circuitmill.config.compose import compose
from circuitmill.config.decode import decode
from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.logs import configure
from circuitmill.stages import toyworld


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(cfg: ToyworldConfig, out: Path) -> dict:
    wall, cpu = time.monotonic(), cpu_seconds()
    manifest = toyworld.run(dataclasses.replace(cfg, accept={}), out=out)
    return {
        "seed": cfg.seed,
        "architecture": cfg.transformer.architecture,
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(cpu_seconds() - cpu, 1),
        "accept": cfg.accept,
        **manifest.counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    args, overrides = parser.parse_known_args()
    configure()
    for seed in args.seeds:
        data = compose(["experiment=demo", *overrides, f"toyworld.seed={seed}"])["toyworld"]
        out = args.out / f"seed-{seed}"
        print(json.dumps(measure(decode(ToyworldConfig, data, "toyworld"), out)), flush=True)
        if not args.keep:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
