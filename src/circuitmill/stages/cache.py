"""Stage cache: MLP inputs and outputs of every layer for every token, BOS excluded; or what is at another hookpoint.

| written | by | content |
|---|---|---|
| shard/<name>/activations.zarr | a shard | codes, scales and provenance (stores/activation_schema.py) |
| shard/<name>/chunks.json | a shard | place and crc32c of every chunk |
| shard/<name>/moments.safetensors | a shard | float64 moments of the unquantised activations |
| shards.json | gather | name, split, tokens and manifest digest of every shard, in order |
| normalization.safetensors | gather | moments of the train split and the scales that follow from them |

With `mode: stream` there are no shards, and the normalisation is that of stage calibrate's sample.
"""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32

from circuitmill import __version__, distributed
from circuitmill.config.cache import CacheConfig
from circuitmill.core.codecs import make_codec
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.lm.hookpoints import HOOK_NAMES
from circuitmill.lm.sites import Sites, load_sites
from circuitmill.lm.targets import MlpTargets
from circuitmill.logs import progress
from circuitmill.stores.activation_schema import GROUP, PLACES, Layout, chunk_rows
from circuitmill.stores.activation_writer import ShardWriter, nmse
from circuitmill.stores.activations import NORMALIZATION, SHARDS, shard_paths
from circuitmill.stores.calibration import Calibration
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import NAME, Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.stores.normalization import load_moments, merge_moments, save_moments
from circuitmill.stores.tokens import SPLITS, TokenStore


def run_unit(
    cfg: CacheConfig, *, shard: str, tokenize: Path, calibrate: Path, toyworld: Path | None = None, out: Path
) -> Manifest:
    """Store the activations of one shard.

    Raises:
        ConfigError: no such shard, a budget beyond the corpus, a tokenizer that is not the model's, a hookpoint or
            layer that it does not have, or two models that do not go together.
        DivergedError: the model's activations are not finite.
        StoreError: the token store or the calibration is damaged.
        UpstreamError: the output of an earlier stage is missing or stale, or of another model.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize, calibrate=calibrate)
    store = TokenStore.open(upstreams["tokenize"])
    slices = cfg.slices({split: store.n_sequences(split) for split in SPLITS}, store.context)
    if shard not in slices:
        raise ConfigError(f"a shard among {', '.join(slices)}", found=shard, where="--shard", fix="name one of these")
    _require_same_choice(cfg, upstreams["calibrate"])
    output = StageOutput("cache", cfg, upstreams, out, unit=shard)
    world = upstreams.get("toyworld")
    sites = load_sites(cfg, toyworld=world.folder if world else None, device=distributed.device())
    sites.require_tokenizer(store.manifest.counts["tokenizer_digest"], store.bos_id)
    _require_same_models(sites, upstreams["calibrate"])
    split, start, stop = slices[shard]
    tokens = store.read(split, start, stop)
    with _writer(cfg, output, sites, upstreams, store, tokens, start) as writer:
        _fill(writer, sites, tokens, cfg.batch_sequences)
        counts = writer.finish()
    size = sum(path.stat().st_size for path in output.path(GROUP).rglob("*") if path.is_file())
    return output.finish(
        {
            **counts,
            "split": split,
            "sequences": [start, stop],
            **sites.digests,
            "hookpoint": cfg.hookpoint,
            "places": list(sites.places),
            "n_layers": sites.n_layers,
            "d_model": sites.d_model,
            "bytes": size,
        }
    )


def _require_same_choice(cfg: CacheConfig, calibrate: Manifest) -> None:
    """The calibration is of this hookpoint, these layers and as many models."""
    wanted = plain(cfg)
    for key in ("hookpoint", "layers", "second_model"):
        if calibrate.config.get(key) != wanted[key]:
            raise UpstreamError(
                f"a calibration with {key} {wanted[key]}, as in the configuration of stage cache",
                found=calibrate.config.get(key),
                where=calibrate.folder / NAME,
                fix="run stage calibrate again with the configuration of this run",
            )


def _require_same_models(sites: Sites, calibrate: Manifest) -> None:
    for (name, digest), lm in zip(sites.digests.items(), sites.lms, strict=True):
        if digest != calibrate.counts[name]:
            raise UpstreamError(
                f"a calibration of model {lm.name} ({digest[:12]})",
                found=f"one of a model with digest {calibrate.counts[name][:12]}",
                where=calibrate.folder / NAME,
                fix="run stage calibrate again with this model",
            )


def _writer(
    cfg: CacheConfig,
    output: StageOutput,
    sites: Sites,
    upstreams: dict[str, Manifest],
    store: TokenStore,
    tokens: Int32[np.ndarray, "sequence pos"],
    first: int,
) -> ShardWriter:
    lm = sites.lms[0]
    sequence, position = np.nonzero(tokens != lm.bos_id)
    codec = make_codec(cfg.codec, sites.n_layers, sites.d_model, cfg.group_channels)
    calibration = Calibration.load(upstreams["calibrate"])
    attributes = {
        "model": lm.name,
        "model_revision": cfg.model.revision,
        "model_digest": lm.digest,
        "dtype": cfg.model.dtype,
        "hookpoint": cfg.hookpoint,
        "hookpoints": HOOK_NAMES[cfg.hookpoint],
        "places": list(sites.places),
        "targets": cfg.targets,
        "tokenizer_digest": store.manifest.counts["tokenizer_digest"],
        "calibration_digest": upstreams["calibrate"].digest,
        "context": store.context,
        "bos_id": lm.bos_id,
        "code_version": __version__,
    }
    if cfg.second_model is not None:
        attributes |= {
            "second_model": cfg.second_model.name,
            "second_model_revision": cfg.second_model.revision,
            "second_model_digest": sites.lms[1].digest,
            "second_dtype": cfg.second_model.dtype,
        }
    if cfg.codec == "entropy":
        attributes["bits"] = cfg.bits
    if cfg.targets == "recomputed":
        attributes["mlp_digest"] = MlpTargets.of(lm).digest
    return ShardWriter(
        output,
        codec,
        Layout(
            len(sequence), chunk_rows(codec, len(sequence), cfg.chunk_bytes), cfg.chunks_per_file, cfg.compression_level
        ),
        # with inputs alone, moments are of the same numbers on both sides
        channels={
            place: calibration.places.get(place, calibration.places["inputs"]).channels(cfg.bits) for place in PLACES
        },
        places=PLACES if cfg.targets == "stored" else ("inputs",),
        provenance={"sequence": sequence + first, "position": position, "token_id": tokens[sequence, position]},
        attributes=attributes,
        seed=first,
    )


def _fill(writer: ShardWriter, sites: Sites, tokens: Int32[np.ndarray, "sequence pos"], batch_sequences: int) -> None:
    """Run the model or models over what is not written yet.

    Batches lie where they would in an unbroken run, so that a continued one computes the same numbers.
    """
    keep = tokens != sites.bos_id
    ends = np.cumsum(keep.sum(axis=1))
    done, n_rows = writer.rows_done, int(ends[-1])
    first = int(np.searchsorted(ends, done, side="right"))
    with progress("caching", total=n_rows, unit="tokens", done=done) as bar:
        for low in range(first // batch_sequences * batch_sequences, len(tokens), batch_sequences):
            rows = slice(low, low + batch_sequences)
            inputs, outputs = sites(torch.from_numpy(tokens[rows].astype(np.int64)), torch.from_numpy(keep[rows]))
            before = int(ends[low - 1]) if low else 0
            new = slice(max(done - before, 0), None)
            writer.append(inputs[new], (inputs if outputs is None else outputs)[new])
            bar.advance(len(inputs[new]))


def run(cfg: CacheConfig, *, tokenize: Path, calibrate: Path, toyworld: Path | None = None, out: Path) -> Manifest:
    """Gather the shards: check that they belong together and compute the normalisation of the train split.

    Raises:
        ConfigError: streaming with a budget beyond the corpus.
        DivergedError: a layer's activations are all zero.
        StoreError: a shard's moments are damaged.
        UpstreamError: a shard is missing, or was made with another configuration, model or token store.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize, calibrate=calibrate)
    if cfg.mode == "stream":
        return _streamed(cfg, upstreams, out)
    names = cfg.units()
    units = [load_manifest(path, "cache", name) for name, path in zip(names, shard_paths(out, names), strict=True)]
    output = StageOutput("cache", cfg, upstreams, out, keep=("shard",))
    _require_matching(units, plain(cfg), {name: manifest.digest for name, manifest in upstreams.items()})
    listed = [
        {
            "name": name,
            "split": unit.counts["split"],
            "tokens": unit.counts["tokens"],
            "digest": unit.digest,
        }
        for name, unit in zip(names, units, strict=True)
    ]
    atomic_write(output.path(SHARDS), json.dumps(listed, indent=1) + "\n")
    train = [unit for unit in units if unit.counts["split"] == "train"]
    moments = merge_moments(load_moments(unit.checked_file("moments.safetensors")) for unit in train)
    save_moments(output.path(NORMALIZATION), *moments, scales=True)
    counts = [unit.counts for unit in units]
    errors = {place: nmse(counts, place) for place in PLACES if f"{place}_error" in counts[0]}
    values = len(errors) * counts[0]["n_layers"] * counts[0]["d_model"] * sum(entry["tokens"] for entry in counts)
    size = sum(entry["bytes"] for entry in counts)
    return output.finish(
        {
            "tokens": {split: sum(entry["tokens"] for entry in counts if entry["split"] == split) for split in SPLITS},
            **_of_models(counts[0]),
            "codec": cfg.codec,
            "bytes": size,
            "bits_per_value": round(8 * size / values, 3),
            "nmse": errors,
        }
    )


def _streamed(cfg: CacheConfig, upstreams: dict[str, Manifest], out: Path) -> Manifest:
    """No shards: the normalisation of the calibration's sample, and the number of tokens that a run may ask for."""
    _require_same_choice(cfg, upstreams["calibrate"])
    store = TokenStore.open(upstreams["tokenize"])
    output = StageOutput("cache", cfg, upstreams, out, keep=("shard",))
    save_moments(
        output.path(NORMALIZATION),
        *load_moments(upstreams["calibrate"].checked_file("moments.safetensors")),
        scales=True,
    )
    bos = store.bos_id
    tokens = {
        split: int((store.read(split, 0, cfg.n_sequences(split, store.n_sequences(split), store.context)) != bos).sum())
        for split in SPLITS
    }
    return output.finish({"tokens": tokens, **_of_models(upstreams["calibrate"].counts), "bytes": 0})


def _of_models(counts: dict) -> dict:
    """The counts that say which activations they are, of shards, calibrations and caches alike."""
    keys = ("hookpoint", "places", "n_layers", "d_model", "model_digest", "second_model_digest")
    return {key: counts[key] for key in keys if key in counts}


def _require_matching(units: list[Manifest], config: dict, inputs: dict[str, str]) -> None:
    """All shards of one configuration, one token store and one model."""
    first = units[0]
    for unit in units:
        for what, found, expected in (
            ("configuration", unit.config, config),
            ("upstream digests", unit.inputs, inputs),
            ("models and places", _of_models(unit.counts), _of_models(first.counts)),
        ):
            if found != expected:
                raise UpstreamError(
                    f"shard {unit.unit} with this run's {what}",
                    found="another",
                    where=unit.folder / NAME,
                    fix=f"run shard {unit.unit} of stage cache again",
                )
