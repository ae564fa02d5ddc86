"""What thresholds cost a transcoder that was trained with TopK: one per layer, or one per feature. One JSON line each.

    python -m benchmarks.thresholds --run results/demo [--tokens 250000] [--k 8]

Trains the TopK CLT of benchmarks/frontier.py on the run's cache, sets thresholds on the first 16,384 held-out tokens
and measures the next 16,384: with TopK itself, with one threshold per layer that keeps L0, with one per feature that
keeps each feature's frequency (what the stage does), and with each feature's least kept activation.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.frontier import trainings
from torch import Tensor

from circuitmill.core.conversion import ThresholdCalibration, feature_thresholds
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.core.transcoder import Transcoder
from circuitmill.stages import train
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.transcoders import load_transcoder

TOKENS = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("results/demo"))
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--k", type=int, default=8, choices=(8, 4, 2))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cfg = next(
        cfg
        for kind, value, _, cfg in trainings(arguments.run, arguments.tokens, 1)
        if kind == "TopK CLT" and value == arguments.k
    )
    inputs = {name: arguments.run / name / "manifest.json" for name in ("toyworld", "tokenize", "cache")}
    with tempfile.TemporaryDirectory() as folder:
        train.run(cfg, **inputs, out=Path(folder))
        clt = load_transcoder(Path(folder) / "model")
    store = ActivationStore.open(load_manifest(inputs["cache"]))
    found, test = store.read("heldout", 0, TOKENS), store.read("heldout", TOKENS, 2 * TOKENS)
    for way, a in ways(clt, found.inputs, test.inputs, float(arguments.k)):
        explained = ExplainedVariance(clt.n_layers, clt.d_model)
        explained.update(test.outputs, clt.decode(a, test.inputs))
        l0 = float((a > 0).sum() / a[:, :, 0].numel())
        print(json.dumps({"way": way, "k": arguments.k, "l0": round(l0, 2), "ev": round(explained.pooled(), 4)}))


def ways(clt: Transcoder, x: Tensor, test: Tensor, k: float) -> Iterator[tuple[str, Tensor]]:
    """Activations of the test tokens, by how they come to be."""
    topk, settings = NONLINEARITIES["topk"].apply, Settings(k=k)
    pre, pre_test = clt.pre_activations(x), clt.pre_activations(test)
    kept = topk(pre, clt.log_threshold, settings)
    yield "TopK", topk(pre_test, clt.log_threshold, settings)
    shared = ThresholdCalibration(clt.n_sources)
    shared.update(list(pre.unbind(dim=1)), (kept > 0).sum(dim=(0, 2)).tolist())
    by_way = {
        "one threshold per layer": shared.thresholds()[:, None],
        "one per feature": feature_thresholds(clt, x, (kept > 0).sum(dim=0)),
        "least kept per feature": kept.masked_fill(kept == 0, torch.inf).amin(dim=0),
    }
    for way, threshold in by_way.items():
        yield way, torch.where(pre_test > threshold, pre_test, 0.0)


if __name__ == "__main__":
    main()
