"""How many tokens per CPU second one training step takes, and from which density the dense product is faster.

    python benchmarks/train_step.py [--threads 1] [--batch 1024]

One JSON line per firing rate: tokens per CPU second of the sparse and the dense way. The crossover sets
`circuitmill.kernels.sparse.WORTHWHILE`.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import yaml

from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.kernels import sparse
from circuitmill.training.objective import Moment, evaluate_batch

N_LAYERS, N_FEATURES, D_MODEL = 4, 1024, 128
REPEATS = 8


def speed(cfg: TrainConfig, batch: int, kept: float, limit: float) -> float:
    """Tokens per CPU second of forward, backward and update when a share `kept` of places is above the floor."""
    sparse.WORTHWHILE = limit
    torch.manual_seed(0)
    transcoder = Transcoder(N_LAYERS, N_FEATURES, D_MODEL)
    init.uniform(transcoder, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        transcoder.log_threshold.fill_(math.log(cfg.nonlinearity.bandwidth))
    x, y = torch.randn(batch, N_LAYERS, D_MODEL), torch.randn(batch, N_LAYERS, D_MODEL)
    init.encoder_bias_for_rate(transcoder, x, rate=kept)
    with torch.no_grad():
        transcoder.b_enc -= cfg.nonlinearity.bandwidth / 2
    moment = Moment(cfg.tokens, torch.zeros(N_LAYERS, N_FEATURES, dtype=torch.bool), torch.zeros(N_LAYERS, N_FEATURES))
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.0, fused=True)
    for repeat in range(REPEATS + 2):
        if repeat == 2:
            start = time.process_time()
        evaluate_batch(transcoder, x, y, cfg, moment).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return REPEATS * batch / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = Path(__file__).parents[1] / "config" / "train" / "default.yaml"
    cfg = decode(TrainConfig, yaml.safe_load(options.read_text()), "train")
    for kept in (0.005, 0.01, 0.02, 0.04, 0.08, 0.16):
        ways = {"sparse": 1.0, "dense": -1.0}
        result = {way: round(speed(cfg, arguments.batch, kept, limit)) for way, limit in ways.items()}
        print(json.dumps({"kept": kept, "batch": arguments.batch, "threads": arguments.threads, **result}), flush=True)


if __name__ == "__main__":
    main()
