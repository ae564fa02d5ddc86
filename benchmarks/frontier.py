"""Features per token against explained variance: cross-layer and per-layer transcoders of one number of parameters.

    python -m benchmarks.frontier --run results/demo [--tokens 400000] [--seeds 3] [--plot docs/images/frontier.svg]

Trains every kind at several sparsities and seeds on the run's cache, by the stage itself, and measures the finished
transcoders, which have thresholds, on the cache's held-out tokens. A CLT has 512 features per layer; a per-layer
transcoder has as many as make its encoders and decoders together as large. One JSON line per training, and one per kind
and sparsity with the mean over seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from circuitmill.config.compose import compose
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.core.transcoder import Transcoder
from circuitmill.stages import train
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.transcoders import load_transcoder

N_FEATURES = 512
KINDS = {
    "JumpReLU CLT": ("default", "loss.tanh_sparsity.coefficient", (0.6, 1.2, 2.4)),
    "TopK CLT": ("topk", "nonlinearity.k", (8, 4, 2)),
    "BatchTopK CLT": ("batch_topk", "nonlinearity.k", (8, 4, 2)),
    "JumpReLU PLT": ("plt", "loss.tanh_sparsity.coefficient", (0.6, 1.2, 2.4)),
    "TopK PLT": ("topk", "nonlinearity.k", (8, 4, 2)),
    "BatchTopK PLT": ("batch_topk", "nonlinearity.k", (8, 4, 2)),
}
"""Name -> (option file of train, what sets the sparsity, its values)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("results/demo"))
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, value, seed, cfg in trainings(arguments.run, arguments.tokens, arguments.seeds):
        rows.append({"kind": kind, "value": value, "seed": seed, **measured(arguments.run, cfg)})
        print(json.dumps(rows[-1]), flush=True)
    means = list(averaged(rows))
    for row in means:
        print(json.dumps(row), flush=True)
    if arguments.plot:
        plot(means, arguments.plot)


def trainings(run: Path, tokens: int, seeds: int) -> Iterator[tuple[str, float, int, TrainConfig]]:
    """Configurations of all trainings, kinds in the innermost loop, so that an early end leaves whole comparisons."""
    n_layers = load_manifest(run / "cache" / "manifest.json").counts["n_layers"]
    per_layer = round(N_FEATURES * (n_layers + n_layers * (n_layers + 1) / 2) / (2 * n_layers))
    for seed in range(seeds):
        for index in range(3):
            for kind, (option, key, values) in KINDS.items():
                is_plt = kind.endswith("PLT")
                common = [
                    f"train={option}",
                    f"train.n_features={per_layer if is_plt else N_FEATURES}",
                    f"train.architecture.topology={'plt' if is_plt else 'clt'}",
                    f"train.{key}={float(values[index])}",
                    f"train.seed={seed}",
                    f"train.tokens={tokens}",
                    "train.warmup_tokens=20000",
                    "train.dead_tokens=100000",
                    f"train.checkpoint_tokens={tokens}",
                    "train.monitor.heldout_tokens=0",
                    "train.monitor.behaviour_tokens=0",
                    "train.wandb=false",
                ]
                yield kind, values[index], seed, decode(TrainConfig, compose(common)["train"], "train")


def measured(run: Path, cfg: TrainConfig) -> dict:
    """Train, and measure the finished transcoder on held-out tokens."""
    cache = run / "cache" / "manifest.json"
    inputs = {name: run / name / "manifest.json" for name in ("toyworld", "tokenize", "cache")}
    with tempfile.TemporaryDirectory() as folder:
        manifest = train.run(cfg, **inputs, out=Path(folder))
        clt = load_transcoder(Path(folder) / "model")
    return {"parameters": manifest.counts["parameters"], **fit_of(clt, cache)}


def fit_of(transcoder: Transcoder, cache: Path) -> dict:
    """Features per token and layer, and fit, on a cache's held-out tokens."""
    store = ActivationStore.open(load_manifest(cache))
    explained = ExplainedVariance(transcoder.n_layers, transcoder.d_model)
    fired, n_tokens = 0, store.n_tokens("heldout")
    for start in range(0, n_tokens, 4096):
        rows = store.read("heldout", start, min(start + 4096, n_tokens))
        a = transcoder.encode(rows.inputs)
        fired += int((a > 0).sum())
        explained.update(rows.outputs, transcoder.decode(a, rows.inputs))
    ev = explained.pooled()
    return {"l0": fired / n_tokens / transcoder.n_layers, "ev": ev, "nmse": 1 - ev}


def averaged(rows: list[dict]) -> Iterator[dict]:
    """Means over seeds, and the spread of the error."""
    for kind in KINDS:
        for value in dict.fromkeys(row["value"] for row in rows if row["kind"] == kind):
            own = [row for row in rows if row["kind"] == kind and row["value"] == value]
            yield {
                "kind": kind,
                "value": value,
                "seeds": len(own),
                "parameters": own[0]["parameters"],
                **{key: round(statistics.mean(row[key] for row in own), 5) for key in ("l0", "ev", "nmse")},
                "nmse_sd": round(statistics.stdev(row["nmse"] for row in own), 5) if len(own) > 1 else None,
            }


def plot(means: list[dict], path: Path) -> None:
    """Error against L0, a line per kind."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, kind in enumerate(KINDS):
        own = sorted((row["l0"], row["nmse"], row["nmse_sd"] or 0.0) for row in means if row["kind"] == kind)
        style = "--" if kind.endswith("PLT") else "-"
        axes.errorbar(*zip(*own, strict=True), fmt=f"o{style}", color=f"C{number % 3}", label=kind, capsize=2, ms=4)
    axes.set(xscale="log", yscale="log", xlabel="features per token and layer (L0)", ylabel="1 - explained variance")
    for axis, ticks in ((axes.xaxis, (2, 4, 8, 16)), (axes.yaxis, (0.02, 0.03, 0.05, 0.1))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
