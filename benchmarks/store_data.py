"""What the benchmarks of the activation store share: activations to store, and a store of them."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from circuitmill.core.codecs import Codec, make_codec
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


def write_store(
    folder: Path,
    name: str,
    values: dict[str, torch.Tensor],
    *,
    group: int = 32,
    level: int = 0,
    batch: int = 4096,
    unit: str = "train-00000",
    context: int = 64,
) -> ActivationShard:
    """A shard of these inputs and outputs, calibrated on every so-many-th token."""
    kind, bits = CODECS[name]
    tokens, layers, width = values["inputs"].shape
    codec = make_codec(kind, layers, width, group)
    channels = {
        place: PlaceCalibration.of(x[:: max(1, tokens // CALIBRATION_TOKENS)]).channels(bits)
        for place, x in values.items()
    }
    where = np.arange(tokens)
    layout = Layout(tokens, chunk_rows(codec, tokens, 2**20), 32, level)
    output = StageOutput("cache", codec, {}, folder, unit=unit)
    with ShardWriter(
        output,
        codec,
        layout,
        channels=channels,
        places=PLACES,
        provenance={"sequence": where // context, "position": where % context, "token_id": where * 7919 % 1024},
        attributes={"bits": bits},
        seed=0,
    ) as writer:
        for start in range(0, tokens, batch):
            writer.append(*(values[place][start : start + batch] for place in PLACES))
        counts = writer.finish()
    return ActivationShard(output.finish(counts))


def size_of(shard: ActivationShard) -> int:
    """Bytes of everything that a reader needs: the Zarr group and the list of chunks."""
    files = shard._manifest.files
    return sum(entry["bytes"] for name, entry in files.items() if not name.startswith("moments"))


def codec_of(shard: ActivationShard) -> Codec:
    """The codec of a shard."""
    return shard.codec


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
