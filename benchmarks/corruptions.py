"""Is damage to a cache ever read as data? JSON lines: how many of 200 seeded corruptions reading and `verify` noticed.

    python -m benchmarks.corruptions [--count 200] [--tokens 20000]

Each corruption is made to a fresh copy of a cache of two shards: a flipped bit, a truncated file, a deleted file, two
chunks of equal size exchanged inside a file, two files of one array exchanged, the data of the two shards exchanged.
Then everything is read the way the stages do (a whole epoch of batches, both splits in corpus order). `read`: reading
raised one of our errors. `verified`: `circuitmill verify` named a problem. `silent`: reading returned, and what it
returned differs from the undamaged cache. Damage that does not touch what is read (the index of a file that only Zarr
uses, say) must still be named by verify.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from benchmarks.store_data import synthetic, write_store

from circuitmill.errors import CircuitmillError
from circuitmill.stores.activation_schema import CHUNKS, GROUP, PLACES
from circuitmill.stores.activation_shard import ActivationShard, ShardBlocks
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import NAME, TIMING, load_manifest
from circuitmill.stores.verify import verify

UNITS = ("train-00000", "train-00001")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--codec", nargs="*", default=["int8", "entropy-4"])
    arguments = parser.parse_args()
    for name in arguments.codec:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(study(name, Path(folder), arguments)), flush=True)


def study(name: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Counts over all corruptions of a cache of one codec."""
    good = folder / "good" / "cache" / "shard"
    for seed, unit in enumerate(UNITS):
        x = synthetic("t4x50", arguments.tokens, 2, 64) + seed
        # chunks of 4,096 tokens: several in a file, several files in an array
        write_store(good / unit, name, {"inputs": x, "outputs": 2 * x.flip(0)}, unit=unit)
    expected = everything(good)
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for index in range(arguments.count):
        generator = random.Random(index)
        bad = folder / "bad" / "cache" / "shard"
        shutil.copytree(good, bad)
        kind = CORRUPTIONS[index % len(CORRUPTIONS)]
        while unchanged(bad, good):  # two equal chunks may have been exchanged
            kind(bad, generator)
        kinds[kind.__name__] += 1
        try:
            same = all(np.array_equal(a, b) for a, b in zip(everything(bad), expected, strict=True))
            counts["harmless" if same else "silent"] += 1
        except CircuitmillError:
            counts["read"] += 1
        counts["verified"] += not all(is_good(bad / unit) for unit in UNITS)
        shutil.rmtree(folder / "bad")
    return {"benchmark": "corruptions", "codec": name, "count": arguments.count, **counts, "kinds": dict(kinds)}


def unchanged(one: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes."""
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    ]
    return contents[0] == contents[1]


def is_good(unit: Path) -> bool:
    """Whether `circuitmill verify` finds nothing wrong."""
    try:
        return not verify(unit).problems
    except CircuitmillError:
        return False


def everything(folder: Path) -> list[np.ndarray]:
    """All that stages read of a cache."""
    shards = [ActivationShard(load_manifest(folder / unit / NAME, "cache", unit)) for unit in UNITS]
    found = []
    for shard in shards:
        for file in range(shard.n_files):
            rows, where = shard.read_file(file, PLACES)
            found += [*rows.values(), *where.values()]
    with BatchSource(ShardBlocks(shards), seed=0, batch_tokens=1000, pool_tokens=5000) as source:
        for index in range(source.n_batches_per_epoch):
            batch = source.batch(index)
            found += [value.numpy() for side in (batch.inputs, batch.outputs) for value in side.arrays.values()]
    return found


def pick(folder: Path, generator: random.Random) -> Path:
    """Any file of either shard but the one that says how long it took."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TIMING]
    return generator.choice(files)


def flip(folder: Path, generator: random.Random) -> None:
    """One bit."""
    path = pick(folder, generator)
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(folder: Path, generator: random.Random) -> None:
    """The end of a file."""
    path = pick(folder, generator)
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def delete(folder: Path, generator: random.Random) -> None:
    """A file."""
    pick(folder, generator).unlink()


def swap_chunks(folder: Path, generator: random.Random) -> None:
    """Two chunks of a file; where their sizes differ, as many bytes of each as fit."""
    shard = folder / generator.choice(UNITS)
    noted = json.loads((shard / CHUNKS).read_text())
    name = generator.choice([name for name, files in noted.items() if max(map(len, files)) > 1])
    files = [index for index, entries in enumerate(noted[name]) if len(entries) > 1]
    index = generator.choice(files)
    first, second = generator.sample(noted[name][index], 2)
    path = next(path for path in (shard / GROUP / name / "c" / str(index)).rglob("*") if path.is_file())
    content = bytearray(path.read_bytes())
    size = min(first[1], second[1])
    a, b = slice(first[0], first[0] + size), slice(second[0], second[0] + size)
    content[a], content[b] = content[b], content[a]
    path.write_bytes(content)


def swap_files(folder: Path, generator: random.Random) -> None:
    """The same file of inputs and outputs, or of the two shards."""
    shard = folder / generator.choice(UNITS)
    path = generator.choice([p for p in sorted((shard / GROUP / "inputs").rglob("c/*/*/*")) if p.is_file()])
    if generator.random() < 0.5:
        other = Path(str(path).replace("/inputs/", "/outputs/"))
    else:
        names = dict(zip(UNITS, reversed(UNITS), strict=True))
        other = folder / names[shard.name] / path.relative_to(shard)
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


def swap_shards(folder: Path, generator: random.Random) -> None:
    """The data of the two shards, with or without their manifests."""
    first, second = (folder / unit for unit in UNITS)
    names = [GROUP] if generator.random() < 0.5 else [path.name for path in first.iterdir()]
    for name in names:
        (first / name).rename(folder / "aside")
        (second / name).rename(first / name)
        (folder / "aside").rename(second / name)


CORRUPTIONS = (flip, truncate, delete, swap_chunks, swap_files, swap_shards)

if __name__ == "__main__":
    main()
