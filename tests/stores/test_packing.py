import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitmill.stores.packing import Packed, Packer

BOS = 1


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _pack(documents: list[np.ndarray], context: int) -> list[Packed]:
    packer = Packer(context, BOS)
    return [full for number, tokens in enumerate(documents) for full in packer.add(number, tokens)]


def test_bos_in_front_and_between_and_documents_go_on() -> None:
    one = _pack([_ids(5, 6), _ids(7, 8, 9), _ids(10)], 5)
    assert one[0].tokens.tolist() == [BOS, 5, 6, BOS, 7]
    assert one[0].segments == [(1, 0, 0), (4, 1, 0)]
    assert (one[0].next_document, one[0].next_offset) == (1, 1)
    assert one[1].tokens.tolist() == [BOS, 8, 9, BOS, 10]
    assert one[1].segments == [(1, 1, 1), (4, 2, 0)]


def test_one_free_position_is_filled_by_bos() -> None:
    (full,) = _pack([_ids(5, 6, 7), _ids(8)], 5)
    assert full.tokens.tolist() == [BOS, 5, 6, 7, BOS]
    assert full.segments == [(1, 0, 0)]
    assert full.n_tokens == 3


def test_waiting_counts_document_tokens_only() -> None:
    packer = Packer(6, BOS)
    packer.add(0, _ids(5))
    packer.add(1, _ids(6, 7))
    assert packer.waiting == 3


documents = st.lists(
    st.lists(st.integers(2, 99), max_size=23).map(lambda ids: np.array(ids, dtype=np.int32)), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(2, 9))
def test_segments_give_the_documents_back(texts: list[np.ndarray], context: int) -> None:
    rebuilt: dict[int, list[int]] = {}
    for full in _pack(texts, context):
        assert full.tokens[0] == BOS
        ends = [start - 1 for start, _, _ in full.segments[1:]] + [context]
        for (start, document, offset), end in zip(full.segments, ends, strict=True):
            piece = [token for token in full.tokens[start:end].tolist() if token != BOS]
            assert offset == len(rebuilt.setdefault(document, []))
            rebuilt[document] += piece
    for document, tokens in rebuilt.items():
        assert tokens == texts[document][: len(tokens)].tolist()
    assert sum(map(len, rebuilt.values())) > sum(map(len, texts)) - context


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(2, 9), st.data())
def test_packing_goes_on_from_any_sequence(texts: list[np.ndarray], context: int, data: st.DataObject) -> None:
    straight = _pack(texts, context)
    if not straight:
        return
    cut = data.draw(st.integers(0, len(straight) - 1))
    at = straight[cut]
    packer = Packer(context, BOS)
    again = []
    for number in range(at.next_document, len(texts)):
        again += packer.add(number, texts[number], at.next_offset if number == at.next_document else 0)
    assert [full.tokens.tolist() for full in again] == [full.tokens.tolist() for full in straight[cut + 1 :]]
    assert [full.segments for full in again] == [full.segments for full in straight[cut + 1 :]]


@pytest.mark.parametrize("context", [2, 3])
def test_shortest_contexts(context: int) -> None:
    fulls = _pack([_ids(5, 6, 7)], context)
    assert all(full.tokens[0] == BOS and len(full.tokens) == context for full in fulls)
