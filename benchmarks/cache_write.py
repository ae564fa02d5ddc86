"""How much does writing the cache add to the model's forward pass? JSON lines, ratios taken in one run.

    python benchmarks/cache_write.py --run results/demo [--codec int8] [--tokens 131072] [--threads 1]
    python benchmarks/cache_write.py --gpt2 [--device cuda]

With --run the model is the run's own, with --gpt2 one of GPT-2's shape with random weights. "forward" runs the model
and its hooks over all tokens and throws the activations away; "cached" hands them to a shard's writer (moments,
encoding, shuffling, checksums, fsync). Rounds alternate, the ratio is of the medians. `added_wall` is what a user waits
longer; `added_cpu` what the writer costs in processor time, which another core may bear.
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

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--codec", nargs="*", default=["int8", "int4", "entropy-4", "bf16"], choices=list(CODECS))
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--batch-sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    lm, tokens = gpt2(arguments.tokens, device) if arguments.gpt2 else of_run(arguments.run, arguments.tokens, device)
    batches = torch.from_numpy(tokens.astype(np.int64)).split(arguments.batch_sequences)
    sample = [values.flatten(0, 1).float().cpu() for values in capture_mlp(lm, batches[0])]
    constants = {place: PlaceCalibration.of(x[:2048]) for place, x in zip(PLACES, sample, strict=True)}
    for name in arguments.codec:
        rounds: dict[str, list[tuple[float, float]]] = {"forward": [], "cached": []}
        for _ in range(ROUNDS):
            rounds["forward"].append(timed(lm, batches, None))
            rounds["cached"].append(timed(lm, batches, (name, constants)))
        row = {"benchmark": "cache_write", "model": lm.name, "codec": name, "device": arguments.device}
        row |= {"threads": arguments.threads, "tokens": tokens.size}
        for index, kind in enumerate(("wall", "cpu")):
            forward, cached = (statistics.median(one[index] for one in rounds[way]) for way in ("forward", "cached"))
            row[f"forward_tokens_per_{kind}_second"] = round(tokens.size / forward)
            row[f"added_{kind}"] = round(cached / forward - 1, 3)
        print(json.dumps(row), flush=True)


def timed(lm: LanguageModel, batches: tuple[torch.Tensor, ...], store: tuple | None) -> tuple[float, float]:
    """Wall and processor seconds of one pass over all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        if store is None:
            for batch in batches:
                inputs, outputs = capture_mlp(lm, batch)
                kept = (batch != lm.bos_id).to(lm.device)
                inputs[kept], outputs[kept]
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
        else:
            cached(lm, batches, Path(folder), *store)
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
            inputs, outputs = capture_mlp(lm, batch)
            kept = (batch != lm.bos_id).to(lm.device)
            writer.append(inputs[kept], outputs[kept])
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
