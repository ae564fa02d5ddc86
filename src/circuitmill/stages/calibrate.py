"""Stage calibrate: what the codecs of the activation store must know of a model.

| written | content |
|---|---|
| calibration.safetensors | center and scale of every channel, bits per step (stores/calibration.py) |
| moments.safetensors | float64 moments of the same tokens, from which a streaming run takes its normalisation |
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from circuitmill import distributed
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.errors import ConfigError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import LanguageModel, load_language_model, require_tokenizer
from circuitmill.logs import progress
from circuitmill.stores.calibration import Calibration, PlaceCalibration
from circuitmill.stores.manifest import Manifest, StageOutput, load_upstreams
from circuitmill.stores.normalization import Moments, merge_moments, moments_of, save_moments
from circuitmill.stores.tokens import TokenStore

MOMENTS = "moments.safetensors"

Pair = tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]


def run(cfg: CalibrateConfig, *, tokenize: Path, toyworld: Path | None = None, out: Path) -> Manifest:
    """Measure the activations of a sample of the train split.

    Raises:
        ConfigError: the tokenizer is not the model's, or the sample holds no token but BOS.
        DivergedError: the model's activations are not finite.
        StoreError: the token store is damaged.
        UpstreamError: the output of an earlier stage is missing or stale.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize)
    store = TokenStore.open(upstreams["tokenize"])
    output = StageOutput("calibrate", cfg, upstreams, out)
    world = upstreams.get("toyworld")
    lm = load_language_model(cfg.model, toyworld=world.folder if world else None, device=distributed.device())
    require_tokenizer(lm, store.manifest.counts["tokenizer_digest"], store.bos_id)
    moments, sample = _measure(cfg, lm, _sample(store, cfg.tokens))
    places = {place: PlaceCalibration.of(values) for place, values in zip(("inputs", "outputs"), sample, strict=True)}
    Calibration(places).save(output)
    save_moments(output.path(MOMENTS), *moments)
    return output.finish(
        {
            "tokens": moments[0].count,
            "sample_tokens": len(sample[0]),
            "n_layers": lm.n_layers,
            "d_model": lm.d_model,
            "model_digest": lm.digest,
        }
    )


def _sample(store: TokenStore, tokens: int) -> Int32[np.ndarray, "sequence pos"]:
    """Sequences spread evenly over the train split."""
    there = store.n_sequences("train")
    wanted = min(there, -(-tokens // store.context))
    chosen = np.linspace(0, there - 1, wanted).round().astype(np.int64)
    return np.concatenate([store.read("train", int(index), int(index) + 1) for index in chosen])


def _measure(
    cfg: CalibrateConfig, lm: LanguageModel, tokens: Int32[np.ndarray, "sequence pos"]
) -> tuple[tuple[Moments, Moments], Pair]:
    """Moments of all tokens, and the activations of the first `sample_tokens` of a shuffled order."""
    tokens = np.random.default_rng(0).permutation(tokens)
    parts: list[tuple[Moments, Moments]] = []
    kept: list[Pair] = []
    room = cfg.sample_tokens
    with progress("calibrating", total=tokens.size, unit="tokens") as bar:
        for low in range(0, len(tokens), cfg.batch_sequences):
            batch = torch.from_numpy(tokens[low : low + cfg.batch_sequences].astype(np.int64))
            mask = (batch != lm.bos_id).to(lm.device)
            bar.advance(batch.numel())
            if not bool(mask.any()):
                continue
            x, y = (values[mask] for values in capture_mlp(lm, batch))
            parts.append((moments_of(x, "input"), moments_of(y, "output")))
            if room > 0:
                kept.append((x[:room].float().cpu(), y[:room].float().cpu()))
                room -= len(kept[-1][0])
    if not kept:
        raise ConfigError(
            "sequences with tokens other than BOS",
            found=f"{len(tokens)} of BOS alone",
            where="calibrate.tokens",
            fix="raise it, or tokenize more text",
        )
    inputs, outputs = zip(*kept, strict=True)
    return merge_moments(parts), (torch.cat(inputs), torch.cat(outputs))
