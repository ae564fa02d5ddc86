"""Outputs of the stages before evaluate and features at the smallest size, with a random transcoder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from tests.conftest import REPOSITORY

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.stages import cache, tokenize
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.clt import save_clt
from circuitmill.stores.manifest import StageOutput, load_manifest, load_upstreams

N_LAYERS, N_FEATURES, D_MODEL, CONTEXT = 2, 11, 16, 32
DEAD = (1, 4)
"""Layer and feature that never fires."""
WORDS = ("Dallas", "is", "in", "Texas", "Austin", "capital", "of", "the", "state", "été")


@dataclass(frozen=True)
class Nothing:
    """The configuration of a stage that is not under test."""

    version: int = 0


def options(stage: str, option: str, **changes: object) -> dict:
    """An option file as plain data, with changes."""
    return yaml.safe_load((REPOSITORY / "config" / stage / f"{option}.yaml").read_text()) | changes


def model_options(folder: Path) -> dict:
    """A local model."""
    return {"source": "folder", "name": str(folder), "revision": "", "dtype": "float32"}


def make_cache(folder: Path, model_dir: Path, *, seed: int = 0) -> dict[str, Path]:
    """Manifests of a token store and of its unquantised activations."""
    rng = np.random.default_rng(seed)
    sentences = [" ".join(rng.choice(WORDS, size=int(rng.integers(2, 6)))) + "." for _ in range(60)]
    text = folder / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    # numbered, because a text that occurs twice is one document
    text.write_text("".join(f"{sentences[n % 60]} {n}\n" for n in range(240)))
    model = model_options(model_dir)
    plain = options("tokenize", "files", model=model, files=[str(text)], context=CONTEXT, heldout_fraction=0.25)
    tokenize.run(decode(TokenizeConfig, plain, "tokenize"), out=folder / "tokenize")
    paths = {"tokenize": folder / "tokenize" / "manifest.json"}
    plain = options("cache", "tiny", model=model, codec="float32", train_tokens=None, heldout_tokens=None)
    cfg = decode(CacheConfig, plain, "cache")
    for shard in cfg.units():
        cache.run_unit(cfg, shard=shard, **paths, out=folder / "cache" / "shard" / shard)
    cache.run(cfg, **paths, out=folder / "cache")
    return paths | {"cache": folder / "cache" / "manifest.json"}


def make_train(folder: Path, cache_path: Path, transcoder: Transcoder, *, version: int = 0) -> Path:
    """The manifest of a training that ended with this transcoder."""
    output = StageOutput("train", Nothing(version), load_upstreams(cache=cache_path), folder)
    save_clt(output.path("model"), transcoder, scan="./data/features/x", model_name="tiny")
    output.finish({})
    return folder / "manifest.json"


@torch.no_grad()
def random_transcoder(cache_path: Path, density: float = 0.06) -> Transcoder:
    """Random weights; thresholds such that features fire on about this share of tokens, and one on none."""
    store = ActivationStore.open(load_manifest(cache_path, "cache"))
    x = store.read("train", 0, store.n_tokens("train")).inputs
    transcoder = Transcoder(N_LAYERS, N_FEATURES, D_MODEL)
    generator = torch.Generator().manual_seed(1)
    for parameter in (transcoder.W_enc, transcoder.b_dec, *transcoder.W_dec):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    bound = transcoder.pre_activations(x).quantile(1 - density, dim=0)
    # a bias makes every threshold positive
    transcoder.b_enc.copy_(1.0 - bound)
    transcoder.log_threshold.fill_(0.0)
    transcoder.log_threshold[DEAD] = 10.0
    return transcoder
