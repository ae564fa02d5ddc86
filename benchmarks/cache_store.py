"""How fast is the activation store, and how exact? JSON lines; one thread; rates per second of CPU time.

    python benchmarks/cache_store.py --tokens 100000 --layers 4 --width 128

Activations are random, heavy-tailed (Student's t, 4 degrees of freedom), with every 97th channel enlarged 50 times.
"write" is what a shard costs beside the model (moments, quantisation, compression, disk), "pools" an epoch of shuffled
batches read from disk, "memory" the same with all tokens in one pool. GB are those of the same numbers in bfloat16.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from circuitmill.stores.activation_schema import PLACES, chunk_rows
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.activation_writer import Layout, ShardWriter, nmse
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.quantize import make_codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("tokens", 100_000), ("layers", 4), ("width", 128), ("group", 32), ("batch", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for codec in ("int8", "bf16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            measure(codec, arguments, Path(folder))


def activations(arguments: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((arguments.tokens, arguments.layers, arguments.width))
    x[:, :, ::97] *= 50
    return x


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> None:
    codec = make_codec(name, arguments.layers, arguments.width, arguments.group)
    x = activations(arguments)
    gigabytes = 2 * x.numel() * 2 / 1e9
    where = np.arange(arguments.tokens)
    output = StageOutput("cache", codec, {}, folder, unit="train-00000")
    layout = Layout(chunk_rows(codec, arguments.tokens, 2**20), 32, 8192, 1)
    sizes = {"n_layers": arguments.layers, "d_model": arguments.width}
    provenance = {"sequence": where, "position": where, "token_id": where}
    counts = {}

    def write() -> None:
        writer = ShardWriter(output, codec, layout, provenance, sizes)
        for part in x.split(arguments.batch):
            writer.append(part, part)
        counts.update(writer.finish())

    seconds = timed(write)
    shard = ActivationShard(output.finish(counts))
    size = sum(entry["bytes"] for entry in shard._manifest.files.values())
    row = {
        "benchmark": "cache_store",
        "codec": name,
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "width": arguments.width,
        "bits_per_value": 8 * size / (2 * x.numel()),
        "nmse": max(max(nmse([counts], place)) for place in PLACES),
        "write_gb_per_cpu_second": gigabytes / seconds,
    }
    for label, pool in (("pools", arguments.tokens // 4), ("memory", arguments.tokens)):
        with BatchSource([shard], seed=0, batch_tokens=arguments.batch, pool_tokens=pool) as source:
            if label == "memory":
                source.batch(0)
            seconds = timed(lambda source=source: [source.batch(i) for i in range(source.n_batches_per_epoch)])
            read = gigabytes * source.n_batches_per_epoch * arguments.batch / arguments.tokens
            row[f"{label}_gb_per_cpu_second"] = read / seconds
    print(json.dumps(row))


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
