"""What the benchmarks of the activation store share: activations to store, and a store of them."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from circuitmill.core.codecs import make_codec
from circuitmill.stores.activation_schema import PLACES, Layout, chunk_rows
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.activation_writer import ShardWriter
from circuitmill.stores.calibration import PlaceCalibration
from circuitmill.stores.manifest import StageOutput

CODECS = {
    "float32": ("float32", 4.0),
    "bf16": ("bf16", 4.0),
    "int8": ("int8", 4.0),
    "int4": ("int4", 4.0),
    "int2": ("int2", 4.0),
    **{f"entropy-{bits}": ("entropy", float(bits)) for bits in (2, 3, 4, 5, 6)},
}
"""Name -> codec and bits."""
CALIBRATION_TOKENS = 2048
BATCH, CONTEXT = 4096, 64


def add_shape(parser: argparse.ArgumentParser, tokens: int = 65_536) -> None:
    """Options of size."""
    for name, value in (("tokens", tokens), ("layers", 4), ("width", 128), ("group", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)


def synthetic(kind: str, tokens: int, layers: int, width: int) -> torch.Tensor:
    """Activations of a known distribution; every call with the same arguments gives the same numbers.

    Args:
        kind: normal; t3 (Student's t, 3 degrees of freedom); t4x50 (4 degrees, every 97th channel 50 times as large);
            massive (t4x50, and every 64th token has 2,000 in one channel, as first positions do).
    """
    torch.manual_seed(0)
    shape = (tokens, layers, width)
    if kind == "normal":
        return torch.randn(shape)
    x = torch.distributions.StudentT(3.0 if kind == "t3" else 4.0).sample(shape)
    if kind in ("t4x50", "massive"):
        x[:, :, ::97] *= 50
    if kind == "massive":
        x[::64, :, 5] += 2000.0
    return x


def calibrated(values: dict[str, torch.Tensor]) -> dict[str, PlaceCalibration]:
    """The codecs' constants, from tokens drawn at random."""
    chosen = torch.randperm(len(values["inputs"]), generator=torch.Generator().manual_seed(0))[:CALIBRATION_TOKENS]
    return {place: PlaceCalibration.of(x[chosen]) for place, x in values.items()}


def write_store(
    folder: Path,
    name: str,
    values: dict[str, torch.Tensor],
    *,
    group: int = 32,
    unit: str = "train-00000",
    constants: dict[str, PlaceCalibration] | None = None,
) -> ActivationShard:
    """A shard of these inputs and outputs.

    Args:
        constants: What `calibrated` gave, to measure it once for several codecs.
    """
    kind, bits = CODECS[name]
    tokens, layers, width = values["inputs"].shape
    codec = make_codec(kind, layers, width, group)
    channels = {place: entry.channels(bits) for place, entry in (constants or calibrated(values)).items()}
    where = np.arange(tokens)
    layout = Layout(tokens, chunk_rows(codec, tokens, 2**20), 32, 0)
    output = StageOutput("cache", codec, {}, folder, unit=unit)
    with ShardWriter(
        output,
        codec,
        layout,
        channels=channels,
        places=PLACES,
        provenance={"sequence": where // CONTEXT, "position": where % CONTEXT, "token_id": where * 7919 % 1024},
        attributes={"bits": bits},
        seed=0,
    ) as writer:
        for start in range(0, tokens, BATCH):
            writer.append(*(values[place][start : start + BATCH] for place in PLACES))
        counts = writer.finish()
    return ActivationShard(output.finish(counts))


def size_of(shard: ActivationShard) -> int:
    """Bytes of everything that a reader needs: the Zarr group and the list of chunks."""
    files = shard._manifest.files
    return sum(entry["bytes"] for name, entry in files.items() if not name.startswith("moments"))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor seconds, over all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], object]) -> float:
    """Seconds by the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
