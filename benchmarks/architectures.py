"""What every option file of `train` reaches on one cache in equal tokens: fit, sparsity, size and speed. JSON lines.

    python -m benchmarks.architectures --run results/demo [--tokens 250000] [--options plt molt]

Trains each by the stage itself, on one thread, and measures the finished transcoder, which has thresholds, on the
cache's held-out tokens. `trained_ev` is of held-out tokens with the training's own nonlinearity. Options that need
another cache or another training (sae, crosscoder, model_diff, end_to_end, adapter) are left out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.frontier import fit_of

from circuitmill.config.compose import compose, config_folder
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.stages import train
from circuitmill.stores.metrics import read_metrics
from circuitmill.stores.transcoders import load_transcoder

LEFT_OUT = ("tiny", "gpt2", "sae", "crosscoder", "model_diff", "end_to_end", "adapter")


def main() -> None:
    known = [path.stem for path in sorted((config_folder() / "train").glob("*.yaml")) if path.stem not in LEFT_OUT]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("results/demo"))
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--options", nargs="*", default=known, choices=known)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for option in arguments.options:
        print(json.dumps({"option": option, **trained(option, arguments.run, arguments.tokens)}), flush=True)


def trained(option: str, run: Path, tokens: int) -> dict:
    """Train one option and measure it."""
    overrides = {
        "tokens": tokens,
        "warmup_tokens": 20_000,
        "dead_tokens": 100_000,
        "checkpoint_tokens": tokens,
        "monitor.heldout_tokens": 8_192,
        "monitor.heldout_every_tokens": tokens,
        "monitor.behaviour_tokens": 0,
        "wandb": "false",
    }
    plain = compose([f"train={option}", *(f"train.{key}={value}" for key, value in overrides.items())])["train"]
    cfg = decode(TrainConfig, plain, "train")
    inputs = {name: run / name / "manifest.json" for name in ("toyworld", "tokenize", "cache")}
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        manifest = train.run(cfg, **inputs, out=Path(folder))
        seconds = time.process_time() - before
        fit = fit_of(load_transcoder(Path(folder) / "model"), run / "cache" / "manifest.json")
        last = read_metrics(Path(folder) / "metrics.jsonl")[-1]
    return {
        "parameters": manifest.counts["parameters"],
        **{key: round(value, 4) for key, value in fit.items()},
        "trained_ev": round(last["heldout_ev"], 4),
        "dead": round(last["dead"], 4),
        "tokens_per_cpu_second": round(tokens / seconds),
    }


if __name__ == "__main__":
    main()
