"""How much does writing the cache add to the model's forward pass? JSON lines, ratios taken in one run.

    python -m benchmarks.cache_write --run results/demo [--codec int8] [--tokens 131072] [--rounds 7]
    python -m benchmarks.cache_write --folder results/demo/toyworld/model
    python -m benchmarks.cache_write --gpt2 [--device cuda]

With --run model and tokens are the run's own, with --folder the model is a saved one and tokens are random, with --gpt2
the model has GPT-2's shape and random weights. A round goes over all tokens three times: "bare" runs the model alone,
without hooks; "captured" also keeps the activations of its MLPs, and throws them away; "cached" hands them to a shard's
writer (moments, encoding, shuffling, checksums, fsync). The order changes from round to round, every ratio is between
passes of one round, and what is printed are the ratios' lower quartile, median and upper quartile, so that a machine
that slows down for a while does no harm. `*_wall` is what a user waits longer; `*_cpu` is processor time, which another
core may bear. The bar, 15% of wall time on a CPU, is for `cached_wall`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.store_data import CODECS

from circuitmill.core.codecs import make_codec
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import LanguageModel
from circuitmill.stores.activation_schema import PLACES, Layout, chunk_rows
from circuitmill.stores.activation_writer import ShardWriter
from circuitmill.stores.calibration import PlaceCalibration
from circuitmill.stores.manifest import StageOutput

WAYS = ("bare", "captured", "cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--codec", nargs="*", default=["int8", "int4", "entropy-4", "bf16"], choices=list(CODECS))
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--batch-sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.gpt2:
        lm, tokens = gpt2(arguments.tokens, device)
    elif arguments.folder:
        lm, tokens = of_folder(arguments.folder, arguments.tokens, device)
    else:
        lm, tokens = of_run(arguments.run, arguments.tokens, device)
    batches = torch.from_numpy(tokens.astype(np.int64)).split(arguments.batch_sequences)
    sample = [values.flatten(0, 1).float().cpu() for values in capture_mlp(lm, batches[0])]
    constants = {place: PlaceCalibration.of(x[:2048]) for place, x in zip(PLACES, sample, strict=True)}
    for name in arguments.codec:
        row = {"benchmark": "cache_write", "model": lm.name, "codec": name, "device": arguments.device}
        row |= {"threads": arguments.threads, "tokens": tokens.size, "rounds": arguments.rounds}
        print(json.dumps(row | measured(lm, batches, (name, constants), arguments.rounds)), flush=True)


def measured(lm: LanguageModel, batches: tuple[torch.Tensor, ...], store: tuple, rounds: int) -> dict:
    """Rates of the bare pass, and what the other two add to it."""
    # the allocator needs a pass to learn which sizes it will be asked for
    timed(lm, batches, "cached", store)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for index in range(rounds):
        for way in WAYS[index % 3 :] + WAYS[: index % 3]:
            times[way].append(timed(lm, batches, way, store))
    row: dict = {}
    n_tokens = sum(batch.numel() for batch in batches)
    for index, kind in enumerate(("wall", "cpu")):
        bare = [one[index] for one in times["bare"]]
        row[f"bare_tokens_per_{kind}_second"] = round(n_tokens / statistics.median(bare))
        for way in WAYS[1:]:
            added = [one[index] / alone - 1 for one, alone in zip(times[way], bare, strict=True)]
            row[f"{way}_{kind}"] = [round(float(value), 3) for value in np.quantile(added, [0.25, 0.5, 0.75])]
    return row


def timed(lm: LanguageModel, batches: tuple[torch.Tensor, ...], way: str, store: tuple) -> tuple[float, float]:
    """Wall and processor seconds of one pass over all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        if way == "cached":
            cached(lm, batches, Path(folder), *store)
        for batch in batches if way == "bare" else ():
            with torch.no_grad():
                lm.model.base_model(input_ids=batch.to(lm.device), use_cache=False)
        for batch in batches if way == "captured" else ():
            capture_mlp(lm, batch, batch != lm.bos_id)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


def cached(lm: LanguageModel, batches: tuple[torch.Tensor, ...], folder: Path, name: str, constants: dict) -> None:
    """The same pass, stored."""
    kind, bits = CODECS[name]
    codec = make_codec(kind, lm.n_layers, lm.d_model, 32)
    tokens = torch.cat(batches)
    sequence, position = np.nonzero((tokens != lm.bos_id).numpy())
    layout = Layout(len(sequence), chunk_rows(codec, len(sequence), 2**20), 32, 0)
    with ShardWriter(
        StageOutput("cache", codec, {}, folder, unit="train-00000"),
        codec,
        layout,
        channels={place: entry.channels(bits) for place, entry in constants.items()},
        places=PLACES,
        provenance={"sequence": sequence, "position": position, "token_id": tokens.numpy()[sequence, position]},
        attributes={},
        seed=0,
    ) as writer:
        for batch in batches:
            writer.append(*capture_mlp(lm, batch, batch != lm.bos_id))
        writer.finish()


def of_run(run: Path, n_tokens: int, device: torch.device) -> tuple[LanguageModel, np.ndarray]:
    """A run's model and train tokens."""
    from circuitmill.config.decode import decode
    from circuitmill.config.model import ModelConfig
    from circuitmill.lm.load import load_language_model
    from circuitmill.stores.manifest import load_manifest
    from circuitmill.stores.tokens import TokenStore

    manifest = load_manifest(run / "tokenize" / "manifest.json")
    cfg = decode(ModelConfig, manifest.config["model"], "model")
    store = TokenStore.open(manifest)
    return load_language_model(cfg, toyworld=run / "toyworld", device=device), store.read(
        "train", 0, n_tokens // store.context
    )


def of_folder(folder: Path, n_tokens: int, device: torch.device) -> tuple[LanguageModel, np.ndarray]:
    """A saved model, and random tokens behind its BOS token."""
    from circuitmill.config.model import ModelConfig
    from circuitmill.lm.load import load_language_model

    cfg = ModelConfig(source="folder", name=str(folder), revision="", dtype="float32")
    lm = load_language_model(cfg, toyworld=None, device=device)
    context = min(lm.context, 128)
    tokens = np.random.default_rng(0).integers(0, lm.d_vocab, (n_tokens // context, context))
    tokens[:, 0] = lm.bos_id
    return lm, tokens


def gpt2(n_tokens: int, device: torch.device) -> tuple[LanguageModel, np.ndarray]:
    """GPT-2's shape with random weights, and random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config()
    model = GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    lm = LanguageModel(
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        digest="random",
        bos_id=config.bos_token_id,
        n_layers=config.n_layer,
        d_model=config.n_embd,
        d_vocab=config.vocab_size,
        context=config.n_positions,
        name="gpt2-shaped, random",
    )
    return lm, np.random.default_rng(0).integers(0, 50_000, (n_tokens // 128, 128))


if __name__ == "__main__":
    main()
