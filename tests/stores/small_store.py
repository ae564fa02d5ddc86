"""Small stores of activations, written by the writer itself."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuitmill.core.codecs import make_codec
from circuitmill.stores.activation_schema import PLACES, Layout
from circuitmill.stores.activation_shard import ActivationShard
from circuitmill.stores.activation_writer import ShardWriter
from circuitmill.stores.activations import NORMALIZATION, ActivationStore
from circuitmill.stores.calibration import PlaceCalibration
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.normalization import load_moments, load_normalization, merge_moments, save_moments

LAYERS, WIDTH, TOKENS, GROUP_CHANNELS = 2, 32, 300, 16
ALL_CODECS = ("float32", "bf16", "int8", "int4", "int2", "entropy")
BATCH = 37
"""Tokens of one append; divides nothing."""
LAYOUT = Layout(TOKENS, 16, 4, 0)
"""Files of 64 tokens: four whole ones, and one with two whole chunks and one of 12 tokens."""


@dataclass(frozen=True)
class Config:
    """What decides the bytes of a shard here."""

    codec: str = "int8"
    places: tuple[str, ...] = PLACES
    layout: Layout = LAYOUT


def activations(n_tokens: int = TOKENS, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Inputs and outputs, which differ in size and in where they are centred."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_tokens, LAYERS, width, generator=generator)
    return inputs, 3 + 5 * torch.randn(n_tokens, LAYERS, width, generator=generator)


def provenance(n_tokens: int, first: int = 0) -> dict[str, np.ndarray]:
    """Sequences of seven tokens from position 1 on; the id of token n of the shard is n + 100."""
    numbers = np.arange(n_tokens)
    return {"sequence": first + numbers // 7, "position": numbers % 7 + 1, "token_id": numbers + 100}


def open_writer(
    folder: Path, cfg: Config, data: tuple[Tensor, Tensor], where: dict[str, np.ndarray] | None = None
) -> tuple[StageOutput, ShardWriter]:
    """A writer for such activations, new or where the last one stopped."""
    output = StageOutput("cache", cfg, {}, folder, unit="train-00000")
    codec = make_codec(cfg.codec, LAYERS, data[0].shape[2], GROUP_CHANNELS)
    channels = {place: PlaceCalibration.of(x[:256]).channels(4.0) for place, x in zip(PLACES, data, strict=True)}
    writer = ShardWriter(
        output,
        codec,
        cfg.layout,
        channels=channels,
        places=cfg.places,
        provenance=where or provenance(cfg.layout.n_rows),
        attributes={"model": "random"},
        seed=0,
    )
    return output, writer


def append_all(writer: ShardWriter, data: tuple[Tensor, Tensor], stop: int | None = None) -> None:
    """What stage cache does: batches lie where they always do, less what is written already."""
    done, n_tokens = writer.rows_done, len(data[0])
    for low in range(done // BATCH * BATCH, n_tokens if stop is None else stop, BATCH):
        new = slice(max(done - low, 0), None)
        writer.append(*(x[low : low + BATCH][new] for x in data))


def write_shard(
    folder: Path,
    cfg: Config,
    data: tuple[Tensor, Tensor] | None = None,
    where: dict[str, np.ndarray] | None = None,
) -> Manifest:
    """A finished shard."""
    data = data or activations(cfg.layout.n_rows)
    output, writer = open_writer(folder, cfg, data, where)
    with writer:
        append_all(writer, data)
        return output.finish({**writer.finish(), "split": "train"})


def write_shards(folder: Path, cfg: Config, parts: list[tuple[Tensor, Tensor]]) -> list[ActivationShard]:
    """A shard for each part, all with the constants of the first."""
    shards = []
    for index, data in enumerate(parts):
        layout = Layout(len(data[0]), cfg.layout.chunk, cfg.layout.chunks_per_file, cfg.layout.compression_level)
        here = Config(cfg.codec, cfg.places, layout)
        shards.append(ActivationShard(write_shard(folder / f"train-{index:05d}", here, data)))
    return shards


def open_store(folder: Path, shards: list[ActivationShard]) -> ActivationStore:
    """The shards as one cache with its normalisation."""
    save_moments(
        folder / NORMALIZATION,
        *merge_moments(load_moments(shard._manifest.folder / "moments.safetensors") for shard in shards),
        scales=True,
    )
    manifest = StageOutput("cache", Config(), {}, folder / "gathered").finish({})
    return ActivationStore({"train": shards}, load_normalization(folder / NORMALIZATION), manifest)


def reopen(folder: Path) -> ActivationShard:
    """The shard in a folder, as a later process opens it."""
    return ActivationShard(load_manifest(folder / "manifest.json", "cache", "train-00000"))


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every data file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "timing.json", "ledger.jsonl")
    }
