"""Stage features: what every feature fires on, how often and how strongly, and what it promotes.

1. One pass over the cached activations of each split (`core.collect`) finds statistics and chooses windows.
2. A second pass fetches activations and texts of the chosen windows.
3. Logit weights: what a feature writes to all its targets, summed, and read by the unembedding with the final norm's
   gain folded in and its mean over the vocabulary taken out. Of a crosscoder over two models: what it writes for the
   second, read by that model's unembedding. None where no vector is written to the residual stream: for transforms of a
   mixture, and at hookpoint mlp_in.

Features are numbered by what they read: "layer" l is the l-th place of the cache, and 0 in a crosscoder, whose features
read all of them. Activations are those of the cache, dequantised, or of the model itself if the cache is streamed; BOS
is not among them. Statistics are of the train split. A unit (block) writes features.parquet and windows.parquet, the
gather index.parquet and blocks.json: stores/features.py has their columns, `docs/stages/features.md` their meaning.
"""

from pathlib import Path

import numpy as np
import torch

from circuitmill import distributed
from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.features import FeaturesConfig
from circuitmill.core.block import FeatureBlock
from circuitmill.core.collect import Collector
from circuitmill.core.hashing import text_keys
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.lm.cached import sites_of_cache
from circuitmill.lm.hookpoints import unembedding
from circuitmill.lm.live import LiveActivations
from circuitmill.lm.load import load_language_model
from circuitmill.lm.replacement import check_fits
from circuitmill.lm.sites import Sites
from circuitmill.lm.texts import Words
from circuitmill.logs import progress
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.feature_windows import WindowRows, fetch_windows
from circuitmill.stores.feature_writer import (
    features_table,
    window_tables,
    with_row_groups,
    write_index,
    write_windows,
)
from circuitmill.stores.features import BLOCKS, INDEX, block_span
from circuitmill.stores.manifest import NAME, Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.stores.pieces import Activations, Pieces
from circuitmill.stores.tokens import SPLITS, TokenStore, write_parquet
from circuitmill.stores.transcoders import load_transcoder

PIECE_NUMBERS = 2**24
"""Activations held at once: tokens of a piece x features of a block."""


def run_unit(
    cfg: FeaturesConfig,
    *,
    block: str,
    tokenize: Path,
    cache: Path,
    train: Path,
    toyworld: Path | None = None,
    out: Path,
) -> Manifest:
    """Collect one block of features.

    Raises:
        ConfigError: more blocks than features, a window longer than a sequence, a budget below one sequence.
        ShapeError: the transcoder was made for a model of another shape.
        StoreError: an input is damaged, or the cache was made from other tokens.
        UpstreamError: the output of an earlier stage is missing or stale, or made with another model.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize, cache=cache, train=train)
    transcoder = load_transcoder(upstreams["train"].folder / "model").to(distributed.device())
    features = FeatureBlock(transcoder, _span(cfg, block, transcoder))
    sites = _sites(cfg, upstreams, transcoder)
    splits = _splits(cfg, upstreams, features, sites)
    output = StageOutput("features", cfg, upstreams, out, unit=block)

    # two models of a cache have the same tokenizer
    words = Words(sites.lms[0].tokenizer, sites.bos_id)
    collectors = [_collect(cfg, features, pieces) for pieces in splits]
    train_split = collectors[SPLITS.index("train")]
    rows = [
        fetch_windows(
            pieces,
            # a feature that never fires has nothing to explain: its silent windows would tell nothing
            collector.chosen(train_split.n_active > 0),
            features.encode,
            lambda sequence, pos: words.around(sequence, pos, cfg.words_before),
        )
        for pieces, collector in zip(splits, collectors, strict=True)
    ]
    _write(cfg, output, features, train_split, rows, sites, words)
    return output.finish(
        {
            # what features read numbers them
            "n_layers": transcoder.n_sources,
            "n_features": transcoder.n_features,
            "features": [features.span.start, features.span.stop],
            "tokens": {split: part.n_tokens for split, part in zip(SPLITS, collectors, strict=True)},
            "windows": {part.split: len(part.feature) for part in rows},
            "dead": int((train_split.n_active == 0).sum()),
        }
    )


def _span(cfg: FeaturesConfig, block: str, transcoder: Transcoder) -> slice:
    if cfg.blocks > transcoder.n_features:
        raise ConfigError(
            f"at most {transcoder.n_features} blocks, the number of features per layer",
            found=str(cfg.blocks),
            where="features.blocks",
            fix="use fewer blocks",
        )
    return block_span(block, cfg.blocks, transcoder.n_features)


def _splits(cfg: FeaturesConfig, upstreams: dict[str, Manifest], features: FeatureBlock, sites: Sites) -> list[Pieces]:
    budgets = {"train": cfg.max_train_tokens, "heldout": cfg.max_heldout_tokens}
    tokens = TokenStore.open(upstreams["tokenize"])
    activations = _activations(upstreams["cache"], tokens, sites)
    size = PIECE_NUMBERS // features.n_features
    return [
        Pieces(activations, tokens, split, max_tokens=budgets[split], window=cfg.window, piece_tokens=size)
        for split in SPLITS
    ]


def _activations(cache: Manifest, tokens: TokenStore, sites: Sites) -> Activations:
    """What the cache holds, or, if it is streamed, what it would hold."""
    cfg = decode(CacheConfig, cache.config, "cache")
    if cfg.mode == "disk":
        return ActivationStore.open(cache)
    sequences = {
        split: tokens.read(split, 0, cfg.n_sequences(split, tokens.n_sequences(split), tokens.context))
        for split in SPLITS
    }
    return LiveActivations(sites, sequences, bos_id=tokens.bos_id, batch_sequences=cfg.batch_sequences, manifest=cache)


def _sites(cfg: FeaturesConfig, upstreams: dict[str, Manifest], transcoder: Transcoder) -> Sites:
    """The model, or both, with the places at which the transcoder reads."""
    world, device = upstreams.get("toyworld"), distributed.device()
    folder = world.folder if world else None
    lm = load_language_model(cfg.model, toyworld=folder, device=device)
    sites = sites_of_cache(upstreams["cache"], lm, toyworld=folder, device=device)
    check_fits(sites, transcoder)
    return sites


def _collect(cfg: FeaturesConfig, features: FeatureBlock, pieces: Pieces) -> Collector:
    """The first pass over a split."""
    device = distributed.device()
    collector = Collector(
        features.n_features,
        top=cfg.top_windows,
        quantile=cfg.quantile_windows,
        silent=cfg.silent_windows,
        seed=cfg.seed,
        device=device,
    )
    with progress(f"collecting, {pieces.split}", total=pieces.n_tokens, unit="tokens") as bar:
        for piece in pieces:
            key = text_keys(torch.from_numpy(piece.token_id), torch.from_numpy(piece.starts), cfg.window)
            window = torch.from_numpy(piece.window)
            collector.update(features.encode(piece.inputs), window.to(device), key.to(device))
            bar.advance(len(piece.token_id))
    return collector


def _write(
    cfg: FeaturesConfig,
    output: StageOutput,
    features: FeatureBlock,
    collector: Collector,
    rows: list[WindowRows],
    sites: Sites,
    words: Words,
) -> None:
    first, per_layer = features.span.start, features.width
    # a model's vocabulary may be padded beyond the tokenizer's
    readout = unembedding(sites.lms[-1].model)[: len(words.texts)]
    # behind a norm there is no residual stream to write to
    logits = features.logits(readout, 0 if sites.hookpoint == "mlp_in" else cfg.logits)
    table = features_table(collector, logits, words.texts, first=first, per_layer=per_layer, n_bars=cfg.histogram_bars)
    tables = window_tables(rows, words.texts, features.n_features, first, per_layer)
    groups = write_windows(output.path("windows.parquet"), tables)
    has_windows = np.isin(np.arange(features.n_features), np.concatenate([part.feature for part in rows]))
    table = with_row_groups(table, groups, has_windows)
    write_parquet(output.path("features.parquet"), table, table.num_rows)


def run(
    cfg: FeaturesConfig, *, tokenize: Path, cache: Path, train: Path, toyworld: Path | None = None, out: Path
) -> Manifest:
    """Gather the blocks: check that they belong together and cover every feature once, and index them.

    Raises:
        StoreError: a block's table is damaged.
        UpstreamError: a block is missing, or was made with another configuration or other inputs.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize, cache=cache, train=train)
    blocks = {name: load_manifest(out / "block" / name / NAME, "features", name) for name in cfg.units()}
    _require_matching(blocks, cfg, upstreams)
    output = StageOutput("features", cfg, upstreams, out, keep=("block",))
    first = next(iter(blocks.values())).counts
    density = write_index(blocks, output.path(INDEX), output.path(BLOCKS), first["n_layers"], first["n_features"])
    firing = density[density > 0]
    shares = {"p5": 0.05, "p50": 0.5, "p95": 0.95}
    return output.finish(
        {
            "n_layers": first["n_layers"],
            "n_features": first["n_features"],
            "tokens": first["tokens"],
            "windows": {split: sum(block.counts["windows"][split] for block in blocks.values()) for split in SPLITS},
            "dead": int(len(density) - len(firing)),
            "dead_share": float(1 - len(firing) / len(density)),
            "density_of_firing": {
                name: float(np.quantile(firing, share)) if len(firing) else None for name, share in shares.items()
            },
        }
    )


def _require_matching(blocks: dict[str, Manifest], cfg: FeaturesConfig, upstreams: dict[str, Manifest]) -> None:
    """All blocks of this configuration and these inputs."""
    inputs = {name: manifest.digest for name, manifest in upstreams.items()}
    for name, block in blocks.items():
        for what, found, expected in (
            ("configuration", block.config, plain(cfg)),
            ("upstream digests", block.inputs, inputs),
        ):
            if found != expected:
                raise UpstreamError(
                    f"block {name} with this run's {what}",
                    found="another",
                    where=block.folder / NAME,
                    fix=f"run block {name} of stage features again",
                )
