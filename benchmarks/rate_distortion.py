"""How many bits a number takes, all metadata included, and what error it then has. JSON lines, and a plot.

    python -m benchmarks.rate_distortion [--run results/demo] [--tokens 65536] [--plot docs/images/rate_distortion.svg]

Activations are synthetic (benchmarks/store_data.py) and, with --run, those of the run's language model on its held-out
tokens. Every store is written for real; bits are those of its files. `nmse` is the squared error relative to the mean
square, of the worst layer and place; `nmse_p99` is the 99th percentile over tokens of the same taken token by token;
`ordinary` leaves out channels whose deviation is over ten times the layer's median. CLT-Forge's scheme is
benchmarks/clt_forge.py.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from benchmarks import clt_forge
from benchmarks.store_data import CODECS, add_shape, calibrated, size_of, synthetic, write_store

from circuitmill.stores.activation_shard import ActivationShard

PLACES = ("inputs", "outputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shape(parser)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, values in sources(arguments):
        for row in measure(kind, values, arguments.group):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if arguments.plot:
        plot(rows, arguments.plot)


def sources(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name and activations of every data set."""
    if arguments.run:
        yield "toyworld", of_run(arguments.run, arguments.tokens)
    for kind in ("normal", "t3", "t4x50", "massive"):
        x = synthetic(kind, arguments.tokens, arguments.layers, arguments.width)
        yield kind, {"inputs": x, "outputs": x.flip(0)}


def of_run(run: Path, tokens: int) -> dict[str, torch.Tensor]:
    """Activations of a run's language model on its held-out tokens."""
    from circuitmill.config.decode import decode
    from circuitmill.config.model import ModelConfig
    from circuitmill.lm.capture import capture_mlp
    from circuitmill.lm.load import load_language_model
    from circuitmill.stores.manifest import load_manifest
    from circuitmill.stores.tokens import TokenStore

    manifest = load_manifest(run / "tokenize" / "manifest.json")
    store = TokenStore.open(manifest)
    cfg = decode(ModelConfig, manifest.config["model"], "model")
    lm = load_language_model(cfg, toyworld=run / "toyworld", device=torch.device("cpu"))
    n = min(store.n_sequences("heldout"), -(-tokens // (store.context - 1)))
    kept: dict[str, list[torch.Tensor]] = {place: [] for place in PLACES}
    for low in range(0, n, 64):
        batch = torch.from_numpy(store.read("heldout", low, min(n, low + 64)).astype(np.int64))
        for place, x in zip(PLACES, capture_mlp(lm, batch), strict=True):
            kept[place].append(x[batch != lm.bos_id])
    return {place: torch.cat(parts)[:tokens] for place, parts in kept.items()}


def measure(kind: str, values: dict[str, torch.Tensor], group: int) -> Iterator[dict]:
    """One row per codec."""
    numbers = sum(x.numel() for x in values.values())
    constants = calibrated(values)
    for name in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            shard = write_store(Path(folder), name, values, group=group, constants=constants)
            restored = dict(restore(shard))
            yield {"data": kind, "codec": name, "bits": 8 * size_of(shard) / numbers, **errors(values, restored)}
    for bits in clt_forge.LIMITS:
        with tempfile.TemporaryDirectory() as folder:
            size = clt_forge.save(Path(folder) / "split.bin", values, bits)
            restored = {}
            for place, x in values.items():
                codes, scales = clt_forge.quantise(x.numpy(), bits)
                restored[place] = torch.from_numpy(codes * scales[None, :, None])
        yield {"data": kind, "codec": f"CLT-Forge {bits}", "bits": 8 * size / numbers, **errors(values, restored)}


def restore(shard: ActivationShard) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything a shard holds, in corpus order."""
    for place in PLACES:
        parts = []
        for file in range(shard.n_files):
            rows, _ = shard.read_file(file, (place,))
            stored = {name: torch.from_numpy(rows[place, name]) for name in shard.codec.arrays()}
            parts.append(shard.codec.decode(stored, shard.channels[place]))
        yield place, torch.cat(parts)


def errors(values: dict[str, torch.Tensor], restored: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the worst layer and place."""
    nmse, p99, ordinary = [], [], []
    for place, x in values.items():
        squared, energy = (restored[place] - x).square(), x.square()
        deviation = x.std(dim=0)
        usual = (deviation <= 10 * deviation.median(dim=1, keepdim=True).values).float()
        nmse += (squared.sum(dim=(0, 2)) / energy.sum(dim=(0, 2))).tolist()
        ordinary += ((squared * usual).sum(dim=(0, 2)) / (energy * usual).sum(dim=(0, 2))).tolist()
        per_token = squared.sum(dim=2) / energy.sum(dim=2).clamp(min=1e-12)
        p99 += np.quantile(per_token.numpy(), 0.99, axis=0).tolist()
    return {"nmse": max(nmse), "nmse_p99": max(p99), "ordinary": max(ordinary)}


def plot(rows: list[dict], path: Path) -> None:
    """Bits against error, one panel per data set, with the bound for normal numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 4.2), sharey=True, squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        bits = np.linspace(1, 9, 50)
        panel.plot(bits, 4.0**-bits, color="0.7", label="bound for normal numbers")
        own = [row for row in rows if row["data"] == kind]
        for prefix, style in (("entropy", "o-"), ("int", "s"), ("CLT-Forge", "x")):
            chosen = [row for row in own if row["codec"].startswith(prefix)]
            (line,) = panel.plot([r["bits"] for r in chosen], [r["nmse"] for r in chosen], style, label=prefix)
            color = line.get_color()
            panel.plot([r["bits"] for r in chosen], [r["nmse_p99"] for r in chosen], style[0], mfc="none", color=color)
            for row in chosen:
                panel.annotate(row["codec"].removeprefix("CLT-Forge "), (row["bits"], row["nmse"]), fontsize=7)
        panel.set(title=kind, xlabel="bits per number, everything included", yscale="log", ylim=(1e-5, 2))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("NMSE of the worst layer (open: 99th percentile of tokens)")
    panels[0][0].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
