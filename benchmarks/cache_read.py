"""How fast do shuffled batches come from the store? JSON lines; ratios taken in one run, disk cache warm.

    python -m benchmarks.cache_read [--tokens 262144] [--layers 4] [--width 128] [--codec int8 entropy-4]

GB are those of the same numbers in bfloat16, per second of processor time over all threads, hence per core.

    batches   an epoch of shuffled batches of stored codes, checked, in host memory: what the trainer waits for
    decoded   the same, restored to float32 on this processor (on a GPU that is the trainer's device's work)
    zarr      all chunks by zarr's own pipeline, in order, without shuffling, binding of chunks or batches
    zarrs     the same by the zarrs pipeline, if it is installed
    clt_forge its load path as described (benchmarks/clt_forge.py), int8 and int4
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from benchmarks import clt_forge
from benchmarks.store_data import CODECS, add_shape, cpu_seconds, synthetic, write_store

from circuitmill.stores.activation_schema import GROUP, PLACES
from circuitmill.stores.activation_shard import ActivationShard, ShardBlocks
from circuitmill.stores.batches import BatchSource

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shape(parser, tokens=262_144)
    parser.add_argument("--codec", nargs="*", default=["int8", "int4", "entropy-4", "bf16"], choices=list(CODECS))
    parser.add_argument("--batch", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = synthetic("t4x50", arguments.tokens, arguments.layers, arguments.width)
    values = {"inputs": x, "outputs": x}
    gigabytes = 2 * 2 * x.numel() / 1e9
    theirs = {f"clt_forge_{bits}": forge_rate(values, bits, arguments.batch) for bits in ("int8", "int4")}
    for name in arguments.codec:
        with tempfile.TemporaryDirectory() as folder:
            shard = write_store(Path(folder), name, values, group=arguments.group)
            rates = {
                "batches": best(lambda shard=shard: epoch(shard, arguments, decode=False), gigabytes),
                "decoded": best(lambda shard=shard: epoch(shard, arguments, decode=True), gigabytes),
                "zarr": best(lambda folder=folder: by_zarr(Path(folder)), gigabytes),
            }
            if zarrs_pipeline():
                rates["zarrs"] = best(lambda folder=folder: by_zarr(Path(folder), zarrs=True), gigabytes)
        row = {"benchmark": "cache_read", "codec": name, "tokens": arguments.tokens, "layers": arguments.layers}
        row |= {"width": arguments.width, **{key: round(rate, 3) for key, rate in (rates | theirs).items()}}
        row["times_clt_forge_int8"] = round(rates["decoded"] / theirs["clt_forge_int8"], 1)
        row["codes_times_clt_forge_int8"] = round(rates["batches"] / theirs["clt_forge_int8"], 1)
        print(json.dumps(row), flush=True)


def best(work, gigabytes: float) -> float:
    """GB per processor second, the best of some rounds: the machine is shared."""
    return max(gigabytes / cpu_seconds(work) for _ in range(ROUNDS))


def epoch(shard: ActivationShard, arguments: argparse.Namespace, *, decode: bool) -> None:
    """All batches of one epoch, from pools of a quarter of the tokens."""
    with BatchSource(
        ShardBlocks([shard]), seed=0, batch_tokens=arguments.batch, pool_tokens=arguments.tokens // 4
    ) as source:
        for index in range(source.n_batches_per_epoch):
            batch = source.batch(index)
            if decode:
                batch.inputs.decode()
                batch.outputs.decode()


def by_zarr(folder: Path, *, zarrs: bool = False) -> None:
    """Read every array of inputs and outputs, a file's worth of rows at a time."""
    import zarr

    pipeline = "zarrs.ZarrsCodecPipeline" if zarrs else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        group = zarr.open_group(folder / GROUP, mode="r")
        for place in PLACES:
            for _, array in group[place].arrays():
                step = (array.shards or array.shape)[0]
                for start in range(0, array.shape[0], step):
                    array[start : start + step]


def zarrs_pipeline() -> bool:
    """Whether the zarrs package is installed."""
    from importlib.util import find_spec

    return find_spec("zarrs") is not None


def forge_rate(values: dict[str, torch.Tensor], bits: str, batch: int) -> float:
    """GB per processor second of CLT-Forge's way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.bin"
        clt_forge.save(path, values, bits)
        gigabytes = 2 * 2 * values["inputs"].numel() / 1e9
        return best(lambda: clt_forge.batches(clt_forge.load(path), batch, 0), gigabytes)


if __name__ == "__main__":
    main()
