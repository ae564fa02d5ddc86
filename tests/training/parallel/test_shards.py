"""Rankings and sums over ranks, which are threads here."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitmill.core.encoding import Encoding, Source
from circuitmill.core.losses import strongest
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.core.operand import Dense
from circuitmill.core.parts import WHOLE, Parts, Shard, largest, spans_of
from circuitmill.training.parallel.collectives import Group
from circuitmill.training.parallel.layout import chunk
from circuitmill.training.parallel.shards import Shards

NOBODY = Source([], [], torch.empty(0), torch.empty(0))
"""A source that is not asked for anything."""


class Exchange:
    """What one of several threads calls with, all of them see."""

    def __init__(self, size: int) -> None:
        self.size, self._values, self._barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def __call__(self, index: int, value: Any) -> list:
        self._values[index] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class Threads(Group):
    """A group of threads."""

    def __init__(self, index: int, exchange: Exchange) -> None:
        super().__init__(index, exchange.size)
        object.__setattr__(self, "exchange", exchange)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.exchange(self.index, values.detach().clone()))

    def add_(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(self.gather(values).sum(dim=0))


def on_ranks(data: int, features: int, n_features: int, work: Callable[[Shards, int], Any]) -> list[list[Any]]:
    """What `work` gives on each rank, by tokens and features."""
    along = [Exchange(features) for _ in range(data)]
    across = [Exchange(data) for _ in range(features)]

    def one(place: tuple[int, int]) -> Any:
        row, column = place
        groups = (Threads(column, along[row]), Threads(row, across[column]))
        return work(Shards(chunk(n_features, column, features), *groups), row)

    places = [(row, column) for row in range(data) for column in range(features)]
    with ThreadPoolExecutor(len(places)) as pool:
        found = list(pool.map(one, places))
    return [found[row * features : (row + 1) * features] for row in range(data)]


def cut(values: torch.Tensor, parts: Shards, row: int, data: int) -> torch.Tensor:
    """The tokens and features of a rank, of [token source feature]."""
    return values.chunk(data)[row][..., parts.shard.first : parts.shard.last]


def put_together(found: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([torch.cat(row, dim=-1) for row in found])


@pytest.mark.parametrize("name", ["topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax", "jumprelu"])
@given(
    seed=st.integers(0, 10_000),
    layout=st.sampled_from([(1, 2), (1, 3), (2, 1), (2, 2), (3, 2)]),
    spread=st.integers(1, 40),
)
@settings(max_examples=25, deadline=None)
def test_a_nonlinearity_over_ranks_is_that_of_the_whole(name, seed, layout, spread):
    """With few different values there are ties everywhere; the first of equal ones are kept, wherever they are."""
    data, features = layout
    generator = torch.Generator().manual_seed(seed)
    tokens, sources, n_features = 6, 2, 12
    pre = torch.randint(-spread, spread + 1, (tokens, sources, n_features), generator=generator).double()
    log_threshold = torch.full((sources, n_features), 0.3, dtype=torch.float64)
    k = 6.0 if name == "groupmax" else float(torch.randint(1, 12, (), generator=generator))
    expected = NONLINEARITIES[name](pre, log_threshold, Settings(k))

    def work(parts: Shards, row: int) -> torch.Tensor:
        own = log_threshold[:, parts.shard.first : parts.shard.last]
        return NONLINEARITIES[name](cut(pre, parts, row, data), own, Settings(k, parts=parts))

    assert torch.equal(put_together(on_ranks(data, features, n_features, work)), expected)


@given(seed=st.integers(0, 10_000), features=st.sampled_from([2, 3, 5]), k=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_the_strongest_dead_features_are_those_of_the_whole(seed, features, k):
    """Some ranks have none that are allowed."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(5, 10, generator=generator)
    allowed = torch.rand(10, generator=generator) < 0.4

    def kept(features: slice, parts: Parts) -> torch.Tensor:
        own = pre[:, features]
        entries = strongest(Encoding(NOBODY, Dense(own), Dense(own)), k, allowed[features], parts)
        return torch.zeros_like(own).index_put((entries.token, entries.feature), entries.gather(own))

    expected = kept(slice(0, 10), WHOLE)

    def work(parts: Shards, row: int) -> torch.Tensor:
        return kept(slice(parts.shard.first, parts.shard.last), parts)

    assert torch.equal(put_together(on_ranks(1, features, 10, work)), expected)


def test_k_may_be_more_than_there_is():
    values = torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0]])

    def work(parts: Shards, row: int) -> torch.Tensor:
        own = values[:, parts.shard.first : parts.shard.last]
        return parts.largest(own, 9, lambda: pytest.fail("there are no ties above zero"))

    assert put_together(on_ranks(1, 2, 5, work)).tolist() == [[True, False, True, True, False]]


def test_equal_values_on_the_border_are_kept_in_the_order_of_the_row():
    """Tokens first, features within: all ranks' features of the first token come before those of the second."""
    values = torch.ones(2, 1, 6)
    expected = largest(rearrange(values, "token source feature -> source (token feature)"), 7)

    def work(parts: Shards, row: int) -> torch.Tensor:
        own = Settings(3.5, parts=parts)
        return NONLINEARITIES["batch_topk"](cut(values, parts, row, 2), torch.zeros(1, 6), own)

    found = put_together(on_ranks(2, 3, 6, work))
    assert found.flatten().bool().tolist() == expected.flatten().tolist() == [True] * 7 + [False] * 5


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_a_sum_passes_its_gradient_on_once(wire):
    partial = torch.arange(6.0).view(2, 3)

    def work(parts: Shards, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = (partial[parts.shard.first : parts.shard.last].sum(dim=0)).requires_grad_()
        parts = Shards(parts.shard, parts.features, wire=wire)
        total = parts.total(own)
        (total * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        return total.detach(), own.grad

    for total, gradient in on_ranks(1, 2, 2, work)[0]:
        assert total.tolist() == [3.0, 5.0, 7.0] and total.dtype == torch.float32
        assert gradient.tolist() == [1.0, 2.0, 3.0]


def test_what_is_spread_gets_the_gradients_of_all_shards():
    def work(parts: Shards, row: int) -> torch.Tensor:
        x = torch.ones(2, requires_grad=True)
        (parts.spread(x) * (1.0 + parts.shard.first)).sum().backward()
        return x.grad

    assert [found.tolist() for found in on_ranks(1, 3, 3, work)[0]] == [[6.0, 6.0]] * 3


def test_stretches_of_prefixes_are_cut_at_the_borders_of_shards():
    spans = spans_of((2, 7, 10), 10)
    found = [[Shard(first, last, 10).within(span) for span in spans] for first, last in ((0, 4), (4, 8), (8, 10))]
    assert found == [
        [slice(0, 2), slice(2, 4), slice(4, 4)],
        [slice(0, 0), slice(0, 3), slice(3, 4)],
        [slice(0, 0), slice(0, 0), slice(0, 2)],
    ]
