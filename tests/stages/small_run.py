"""Outputs of the stages before evaluate and features at the smallest size, with a random transcoder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.compose import compose
from circuitmill.config.decode import decode
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.core.transcoder import CLT, Transcoder
from circuitmill.stages import cache, calibrate, tokenize
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.clt import save_clt
from circuitmill.stores.manifest import StageOutput, load_manifest, load_upstreams
from circuitmill.stores.transcoders import MODEL, TRACED, as_clt, is_plain_clt, save_transcoder

N_LAYERS, N_FEATURES, D_MODEL, CONTEXT = 2, 11, 16, 32
DEAD = (1, 4)
"""Layer and feature that never fires; layer 0 if features read all layers."""
RESID = {"hookpoint": "resid_post", "targets": "inputs"}
"""A cache of the residual stream."""
WORDS = ("Dallas", "is", "in", "Texas", "Austin", "capital", "of", "the", "state", "été")


@dataclass(frozen=True)
class Nothing:
    """The configuration of a stage that is not under test."""

    version: int = 0


def options(stage: str, option: str, **changes: object) -> dict:
    """An option file as plain data, with changes."""
    return compose([f"{stage}={option}"])[stage] | changes


def model_options(folder: Path) -> dict:
    """A local model."""
    return {"source": "folder", "name": str(folder), "revision": "", "dtype": "float32"}


def make_tokens(folder: Path, model_dir: Path, *, seed: int = 0) -> Path:
    """The manifest of a token store of short texts."""
    rng = np.random.default_rng(seed)
    sentences = [" ".join(rng.choice(WORDS, size=int(rng.integers(2, 6)))) + "." for _ in range(60)]
    text = folder / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    # numbered, because a text that occurs twice is one document
    text.write_text("".join(f"{sentences[n % 60]} {n}\n" for n in range(240)))
    plain = options(
        "tokenize",
        "files",
        model=model_options(model_dir),
        files=[str(text)],
        context=CONTEXT,
        heldout_fraction=0.25,
    )
    tokenize.run(decode(TokenizeConfig, plain, "tokenize"), out=folder / "tokenize")
    return folder / "tokenize" / "manifest.json"


def make_cache(folder: Path, model_dir: Path, *, seed: int = 0, **changes: object) -> dict[str, Path]:
    """Manifests of a token store and of its unquantised activations; changes are of the cache's options."""
    tokens, model = make_tokens(folder, model_dir, seed=seed), model_options(model_dir)
    places = {key: value for key, value in changes.items() if key in ("hookpoint", "layers", "second_model")}
    calibrated = make_calibration(folder / "calibrate", model, tokens, **places)
    whole = {"codec": "float32", "train_tokens": None, "heldout_tokens": None}
    plain = options("cache", "tiny", model=model, **{**whole, **changes})
    cached = run_cache(decode(CacheConfig, plain, "cache"), tokens, calibrated, folder / "cache")
    return {"tokenize": tokens, "cache": cached}


def make_second_model(folder: Path, model_dir: Path) -> Path:
    """A model like another, with its tokenizer and weights a little different."""
    shutil.copytree(model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_upstreams(folder: Path, model_dir: Path, *, n_texts: int, **changes: object) -> dict[str, Path]:
    """Manifests of a cache of the tiny option, with changes, and of its tokens: sums, which a transcoder can learn."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} plus {n * 7 % 10} is {n + n * 7 % 10}\n" for n in range(n_texts)))
    model = model_options(model_dir)
    plain = options("tokenize", "files", model=model, files=[str(text)], context=CONTEXT, heldout_fraction=0.2)
    tokenize.run(decode(TokenizeConfig, plain, "tokenize"), out=folder / "tokenize")
    tokens = folder / "tokenize" / "manifest.json"
    which = {key: changes[key] for key in ("hookpoint", "layers", "second_model") if key in changes}
    calibrated = make_calibration(folder / "calibrate", model, tokens, **which)
    cfg = decode(CacheConfig, options("cache", "tiny", model=model, **changes), "cache")
    return {"tokenize": tokens, "cache": run_cache(cfg, tokens, calibrated, folder / "cache")}


def make_calibration(out: Path, model: dict, tokens: Path, **changes: object) -> Path:
    """The manifest of stage calibrate for a model and its tokens."""
    plain = options("calibrate", "tiny", model=model, **changes)
    calibrate.run(decode(CalibrateConfig, plain, "calibrate"), tokenize=tokens, out=out)
    return out / "manifest.json"


def run_cache(cfg: CacheConfig, tokens: Path, calibrated: Path, out: Path) -> Path:
    """The manifest of stage cache after all its shards."""
    upstreams = {"tokenize": tokens, "calibrate": calibrated}
    for shard in cfg.units():
        cache.run_unit(cfg, shard=shard, **upstreams, out=out / "shard" / shard)
    cache.run(cfg, **upstreams, out=out)
    return out / "manifest.json"


def make_train(folder: Path, cache_path: Path, transcoder: Transcoder, *, version: int = 0) -> Path:
    """The manifest of a training that ended with this transcoder."""
    output = StageOutput("train", Nothing(version), load_upstreams(cache=cache_path), folder)
    label = {"scan": "./data/features/x", "model_name": "tiny"}
    save_transcoder(output.path(MODEL), transcoder, **label)
    if not is_plain_clt(transcoder) and not transcoder.architecture.untraceable:
        save_clt(output.path(TRACED), as_clt(transcoder), **label)
    output.finish({})
    return folder / "manifest.json"


@torch.no_grad()
def random_transcoder(cache_path: Path, density: float = 0.06, architecture: ArchitectureConfig = CLT) -> Transcoder:
    """Random weights; thresholds such that features fire on about this share of tokens, and one on none."""
    store = ActivationStore.open(load_manifest(cache_path, "cache"))
    x = store.read("train", 0, store.n_tokens("train"), outputs=False).inputs
    transcoder = Transcoder(store.n_layers, N_FEATURES, D_MODEL, architecture)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transcoder.named_parameters():
        if name not in ("b_enc", "log_threshold"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    ordered = transcoder.pre_activations(x).sort(dim=0).values
    # in the widest gap near there: equal tokens have equal pre-activations, and rounding must not part them
    near = ordered[int((1 - 1.2 * density) * len(x)) : int((1 - 0.8 * density) * len(x))]
    middle = (near[1:] + near[:-1]) / 2
    bound = middle.gather(0, near.diff(dim=0).argmax(dim=0, keepdim=True))[0]
    # a bias makes every threshold positive
    transcoder.b_enc.copy_(1.0 - bound)
    transcoder.log_threshold.fill_(0.0)
    transcoder.log_threshold[transcoder.n_sources - 1, DEAD[1]] = 10.0
    return transcoder.requires_grad_(False)
