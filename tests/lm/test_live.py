from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.lm.streaming import BATCH, BOS, load, make_tokens

from circuitmill.errors import DivergedError, StoreError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.live import LiveActivations, LiveRows
from circuitmill.lm.load import LanguageModel

TOKENS = {"train": make_tokens(), "heldout": make_tokens(7)[:, ::-1].copy()}


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LanguageModel:
    return load(tiny_model_dir)


def activations(lm: LanguageModel) -> LiveActivations:
    return LiveActivations(
        lm, TOKENS, bos_id=BOS, batch_sequences=BATCH, manifest=SimpleNamespace(folder=Path("somewhere"))
    )


def expected(lm: LanguageModel, split: str) -> LiveRows:
    """All rows of a split, batch by batch from its start."""
    tokens = TOKENS[split]
    parts = []
    for low in range(0, len(tokens), BATCH):
        batch = torch.from_numpy(tokens[low : low + BATCH].astype(np.int64))
        parts.append([side[batch != BOS] for side in capture_mlp(lm, batch)])
    sequence, position = np.nonzero(tokens != BOS)
    inputs, outputs = (torch.cat(sides) for sides in zip(*parts, strict=True))
    return LiveRows(inputs, outputs, sequence, position, tokens[sequence, position])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_any_range_holds_the_tokens_of_the_corpus(lm: LanguageModel, split: str) -> None:
    whole, live = expected(lm, split), activations(lm)
    count = len(whole.token_id)
    assert live.n_tokens(split) == count
    for start, stop in ((0, count), (0, 1), (count - 1, count), (3, 150), (100, 101), (count // 2, count)):
        rows = live.read(split, start, stop)
        for name in ("inputs", "outputs"):
            assert torch.equal(getattr(rows, name), getattr(whole, name)[start:stop])
        for name in ("sequence", "position", "token_id"):
            assert np.array_equal(getattr(rows, name), getattr(whole, name)[start:stop])
        assert live.read(split, start, stop, outputs=False).outputs is None


def test_reading_on_computes_no_batch_twice(lm: LanguageModel) -> None:
    live, calls = activations(lm), []
    handle = mlps(lm.model)[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        for start in range(0, live.n_tokens("train") - 50, 50):
            live.read("train", start, start + 50)
    finally:
        handle.remove()
    assert len(calls) == -(-len(TOKENS["train"]) // BATCH)


def test_outside_the_split(lm: LanguageModel) -> None:
    live = activations(lm)
    for start, stop in ((-1, 3), (4, 4), (0, live.n_tokens("heldout") + 1)):
        with pytest.raises(
            StoreError, match=f"tokens within 0 to .*; found {start} to {stop}\n.*somewhere, split held"
        ):
            live.read("heldout", start, stop)


def test_what_is_not_finite_names_the_layer(tiny_model_dir: Path) -> None:
    broken = load(tiny_model_dir)
    with torch.no_grad():
        mlps(broken.model)[1].c_fc.weight[2, 3] = torch.inf
    with pytest.raises(
        DivergedError, match=r"finite activations; found NaN or infinity\n  where: outputs at mlp\.1 of model"
    ):
        activations(broken).read("train", 0, 10)
