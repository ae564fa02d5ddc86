"""Stage calibrate: what the codecs of the activation store must know of a model.

| written | content |
|---|---|
| calibration.safetensors | center and scale of every channel, bits per step (stores/calibration.py) |
| moments.safetensors | float64 moments of the same tokens, from which a streaming run takes its normalisation |
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32

from circuitmill import distributed
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.errors import ConfigError
from circuitmill.lm.sites import Captured, Sites, load_sites
from circuitmill.logs import progress
from circuitmill.stores.activation_schema import PLACES
from circuitmill.stores.calibration import Calibration, PlaceCalibration
from circuitmill.stores.manifest import Manifest, StageOutput, load_upstreams
from circuitmill.stores.normalization import Moments, merge_moments, moments_of, save_moments
from circuitmill.stores.tokens import TokenStore

MOMENTS = "moments.safetensors"


def run(cfg: CalibrateConfig, *, tokenize: Path, toyworld: Path | None = None, out: Path) -> Manifest:
    """Measure the activations of a sample of the train split.

    Raises:
        ConfigError: the tokenizer is not the model's, the hookpoint or a layer is none of its, two models do not go
            together, or the sample holds no token but BOS.
        DivergedError: the model's activations are not finite.
        StoreError: the token store is damaged.
        UpstreamError: the output of an earlier stage is missing or stale.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize)
    store = TokenStore.open(upstreams["tokenize"])
    output = StageOutput("calibrate", cfg, upstreams, out)
    world = upstreams.get("toyworld")
    sites = load_sites(cfg, toyworld=world.folder if world else None, device=distributed.device())
    sites.require_tokenizer(store.manifest.counts["tokenizer_digest"], store.bos_id)
    moments, sample = _measure(cfg, sites, _sample(store, cfg.tokens))
    places = {
        place: PlaceCalibration.of(values) for place, values in zip(PLACES, sample, strict=True) if values is not None
    }
    Calibration(places).save(output)
    save_moments(output.path(MOMENTS), *moments)
    return output.finish(
        {
            "tokens": moments[0].count,
            "sample_tokens": len(sample[0]),
            "hookpoint": cfg.hookpoint,
            "places": list(sites.places),
            "n_layers": sites.n_layers,
            "d_model": sites.d_model,
            **sites.digests,
        }
    )


def _sample(store: TokenStore, tokens: int) -> Int32[np.ndarray, "sequence pos"]:
    """Sequences spread evenly over the train split."""
    there = store.n_sequences("train")
    wanted = min(there, -(-tokens // store.context))
    chosen = np.linspace(0, there - 1, wanted).round().astype(np.int64)
    return np.concatenate([store.read("train", int(index), int(index) + 1) for index in chosen])


def _measure(
    cfg: CalibrateConfig, sites: Sites, tokens: Int32[np.ndarray, "sequence pos"]
) -> tuple[tuple[Moments, Moments], Captured]:
    """Moments of all tokens, and the activations of the first `sample_tokens` of a shuffled order."""
    tokens = np.random.default_rng(0).permutation(tokens)
    parts: list[tuple[Moments, Moments]] = []
    kept: list[Captured] = []
    room = cfg.sample_tokens
    with progress("calibrating", total=tokens.size, unit="tokens") as bar:
        for low in range(0, len(tokens), cfg.batch_sequences):
            batch = torch.from_numpy(tokens[low : low + cfg.batch_sequences].astype(np.int64))
            wanted = batch != sites.bos_id
            bar.advance(batch.numel())
            if not bool(wanted.any()):
                continue
            x, y = sites(batch, wanted)
            # contiguous: sums are rounded in the order in which numbers lie in memory
            moments = moments_of(x.contiguous(), "input")
            # what is read is also what is reconstructed, if there is nothing else; safetensors wants memory of its own
            parts.append((moments, deepcopy(moments) if y is None else moments_of(y.contiguous(), "output")))
            if room > 0:
                kept.append((x[:room].float().cpu(), None if y is None else y[:room].float().cpu()))
                room -= len(kept[-1][0])
    if not kept:
        raise ConfigError(
            "sequences with tokens other than BOS",
            found=f"{len(tokens)} of BOS alone",
            where="calibrate.tokens",
            fix="raise it, or tokenize more text",
        )
    outputs = [y for _, y in kept if y is not None]
    return merge_moments(parts), (torch.cat([x for x, _ in kept]), torch.cat(outputs) if outputs else None)
