from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stages.small_run import CONTEXT, make_cache

from circuitmill.errors import StoreError
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import load_manifest
from circuitmill.stores.pieces import Pieces
from circuitmill.stores.tokens import TokenStore


@pytest.fixture(scope="module")
def stores(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, TokenStore]:
    paths = make_cache(tmp_path_factory.mktemp("upstreams"), tiny_model_dir)
    return (
        ActivationStore.open(load_manifest(paths["cache"], "cache")),
        TokenStore.open(load_manifest(paths["tokenize"], "tokenize")),
    )


def pieces(stores: tuple[ActivationStore, TokenStore], size: int, limit: int | None = None) -> Pieces:
    return Pieces(*stores, "train", max_tokens=limit, window=12, piece_tokens=size)


def test_pieces_of_any_size_hold_every_token_once(stores: tuple[ActivationStore, TokenStore]) -> None:
    whole = stores[0].read("train", 0, stores[0].n_tokens("train"), outputs=False)
    for size in (1, 200, 10**6):
        parts = list(pieces(stores, size))
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert np.array_equal(np.concatenate([part.token_id for part in parts]), whole.token_id)
        windows = np.concatenate([part.window for part in parts])
        assert np.array_equal(windows, whole.sequence * 3 + whole.position // 12)
    assert len(list(pieces(stores, 1))) > len(list(pieces(stores, 10**6))) == 1


def test_sequences_are_whole_and_tokens_are_where_they_say(stores: tuple[ActivationStore, TokenStore]) -> None:
    seen = []
    for part in pieces(stores, 100):
        seen += range(part.first_sequence, part.first_sequence + len(part.sequences))
        at = part.token_at
        assert ((at < 0) == (part.sequences == stores[1].bos_id)).all()
        assert np.array_equal(part.token_id[at[at >= 0]], part.sequences[at >= 0])
        # a document starts after every BOS, and at the head of a sequence
        head = np.zeros_like(at, dtype=bool)
        head[:, 0] = True
        head[:, 1:] = part.sequences[:, :-1] == stores[1].bos_id
        expected = head[at >= 0]
        assert np.array_equal(part.starts, expected)
    assert seen == list(range(stores[1].n_sequences("train")))


def test_a_limit_leaves_out_the_sequence_that_passes_it(stores: tuple[ActivationStore, TokenStore]) -> None:
    tokens = sum(len(part.token_id) for part in pieces(stores, 64, limit=333))
    lengths = (stores[1].read("train", 0, 20) != stores[1].bos_id).sum(1).cumsum()
    assert tokens == lengths[lengths < 333][-1]
    assert CONTEXT * 9 < tokens < 333


def test_iterating_again_gives_the_same(stores: tuple[ActivationStore, TokenStore]) -> None:
    source = pieces(stores, 150)
    for one, two in zip(source, source, strict=True):
        assert torch.equal(one.inputs, two.inputs)


def test_other_tokens_than_the_caches_are_an_error(
    stores: tuple[ActivationStore, TokenStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = TokenStore.open(load_manifest(make_cache(tmp_path, tiny_model_dir, seed=3)["tokenize"], "tokenize"))
    mixed = Pieces(stores[0], other, "train", max_tokens=None, window=12, piece_tokens=100)
    with pytest.raises(
        StoreError, match="activations of the token store's own tokens; found other tokens in sequences"
    ):
        list(mixed)
