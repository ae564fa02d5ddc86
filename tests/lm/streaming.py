"""What the tests of streamed activations share."""

import signal
import sys
from pathlib import Path

import numpy as np
import torch

from circuitmill.config.model import ModelConfig
from circuitmill.core.codecs import Channels, Codec
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.stream import ExpectedModel, LiveBlocks

BOS, CONTEXT, BATCH = 1, 32, 5


def model_config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(source="folder", name=str(folder), revision="", dtype=dtype)


def load(folder: Path, dtype: str = "float32") -> LanguageModel:
    return load_language_model(model_config(folder, dtype), toyworld=None, device=torch.device("cpu"))


def expected_model(folder: Path, dtype: str = "float32") -> ExpectedModel:
    lm = load(folder, dtype)
    return ExpectedModel(model_config(folder, dtype), None, "cpu", lm.n_layers, lm.d_model, lm.digest)


def make_tokens(sequences: int = 43) -> np.ndarray:
    """Sequences that begin with BOS and have some more inside."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 258, (sequences, CONTEXT)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.1] = BOS
    tokens[:, 0] = BOS
    return tokens


def live_blocks(folder: Path, **options: object) -> LiveBlocks:
    """Not entered yet."""
    return LiveBlocks(expected_model(folder), make_tokens(), bos_id=BOS, batch_sequences=BATCH, threads=1, **options)


class DirectBlocks:
    """The same blocks as LiveBlocks's, computed here and kept."""

    def __init__(self, lm: LanguageModel, tokens: np.ndarray) -> None:
        count = -(-len(tokens) // BATCH)
        bits = lm.model.dtype == torch.bfloat16
        self.codec = Codec("bf16" if bits else "float32", lm.n_layers, lm.d_model)
        self.channels = dict.fromkeys(("inputs", "outputs"), Channels.neutral(lm.n_layers, lm.d_model))
        self.strata = np.zeros(count, dtype=np.int64)
        self.rows = []
        for block in range(count):
            chosen = torch.from_numpy(tokens[block::count].astype(np.int64))
            kept = [side[chosen != BOS] for side in capture_mlp(lm, chosen)]
            x, y = (side.view(torch.uint16).numpy() if bits else side.numpy() for side in kept)
            self.rows.append({("inputs", "values"): x, ("outputs", "values"): y})
        self.sizes = np.array([len(rows["inputs", "values"]) for rows in self.rows])

    def read(self, block: int) -> dict:
        return self.rows[block]


def main() -> None:
    """A process with a producer, for tests that end it: it says the producer's id when a block has been read."""
    # a shell that starts tests in the background has SIGINT ignored, which children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    blocks = live_blocks(folder)
    if how == "forgotten":
        blocks.__enter__()
        _say(blocks)
        return
    with blocks:
        _say(blocks)
        if how == "idle":
            sys.stdin.read()
        while True:
            blocks.read(0)


def _say(blocks: LiveBlocks) -> None:
    blocks.read(3)
    sys.stdout.write(f"{blocks.producer_pid}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
