"""From inputs to activations, as all places of a matrix or as the few that matter, whichever is cheaper.

Both ways give the same values and gradients, up to rounding. What stays dense where few places matter is the product
of inputs and encoders, of which nothing is kept: which places matter is found without a gradient, and at these places
alone pre-activations are computed again, in full precision and with one.

- JumpReLU: places above the threshold less half the kernel's width; below the threshold, optionally on some tokens.
- ReLU and GroupMax: positive places, and each group's largest.
- Top-k kinds: candidates are taken from each source (`kernels.select`), then ranked among each other, and among those
  of other processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from circuitmill.config.names import is_import_path
from circuitmill.config.train import OVER_SOURCES, OVER_TOKENS, TOP_K
from circuitmill.core.nonlinearity import Settings, find_nonlinearity, jumprelu
from circuitmill.core.operand import Dense, Operand
from circuitmill.core.transcoder import Transcoder, read
from circuitmill.kernels import operators
from circuitmill.kernels.entries import Entries, from_places, places
from circuitmill.kernels.select import candidates
from circuitmill.kernels.sparse import Sparse

RANKED = tuple(name for name in TOP_K if name != "groupmax")
"""Nonlinearities that rank a feature among others, which may be elsewhere."""


def wide(values: Tensor) -> Tensor:
    """In float32 at least: products may come in fewer bits, sums and comparisons with thresholds need more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Source:
    """One source's encoders and what they read.

    Args:
        inputs: By layer that is read.
        weights: Likewise, [feature d_model].
        bias: Of the features.
        log_threshold: Of the features.
    """

    inputs: list[Float[Tensor, "token d_model"]]
    weights: list[Float[Tensor, "feature d_model"]]
    bias: Float[Tensor, " feature"]
    log_threshold: Float[Tensor, " feature"]

    @property
    def n_tokens(self) -> int:
        """Of the batch."""
        return len(self.inputs[0])

    @property
    def n_features(self) -> int:
        """Of the source."""
        return len(self.bias)

    def dense(self, features: Int[Tensor, " feature"] | None = None) -> Float[Tensor, "token feature"]:
        """Pre-activations of all features, or of some."""
        weights = self.weights if features is None else [weight[features] for weight in self.weights]
        bias = self.bias if features is None else self.bias[features]
        return wide(read(self.inputs, weights, bias))

    def at(self, entries: Entries) -> Float[Tensor, " entry"]:
        """Pre-activations at these places."""
        pre = self.bias[entries.feature]
        for x, weight in zip(self.inputs, self.weights, strict=True):
            pre = pre + operators.dots(wide(x), entries, weight)
        return pre

    def summed(self) -> Float[Tensor, " feature"]:
        """Sum of the pre-activations over tokens. It is linear in the inputs, so their sum is all that is needed."""
        pre = self.bias * self.n_tokens
        # a difference of large sums, which must not be rounded to fewer bits
        with torch.autocast(self.bias.device.type, enabled=False):
            for x, weight in zip(self.inputs, self.weights, strict=True):
                pre = pre + wide(weight) @ wide(x).sum(dim=0)
        return pre


def sources_of(transcoder: Transcoder, x: Float[Tensor, "token layer d_model"]) -> list[Source]:
    """Every source with what it reads.

    Encoders are taken apart once, so that their gradients are put together once; by index each would be put among
    zeros.
    """
    weights, topology = transcoder.W_enc.unbind(0), transcoder.topology
    biases, thresholds = transcoder.b_enc.unbind(0), transcoder.log_threshold.unbind(0)
    return [
        Source(
            [x[:, layer].contiguous() for layer in topology.reads[source]],
            [weights[row] for row in topology.encoders(source)],
            biases[source],
            thresholds[source],
        )
        for source in range(transcoder.n_sources)
    ]


@dataclass(frozen=True)
class Encoding:
    """A source on a batch; pre-activations and activations are of all places, or of those that matter."""

    source: Source
    pre: Operand
    a: Operand
    ranked: bool = False
    """Whether there are places above the threshold that did not matter."""

    @property
    def sparse(self) -> bool:
        """Whether they are of few places."""
        return isinstance(self.pre, Sparse)

    @cached_property
    def dense_pre(self) -> Float[Tensor, "token feature"]:
        """Pre-activations of all places, computed if need be."""
        return self.pre.values if isinstance(self.pre, Dense) else self.source.dense()

    def of(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "token feature"]:
        """Pre-activations of some features, without a gradient."""
        with torch.no_grad():
            return self.pre.values[:, features] if isinstance(self.pre, Dense) else self.source.dense(features)

    def at(self, entries: Entries) -> Float[Tensor, " entry"]:
        """Pre-activations at these places."""
        return entries.gather(self.pre.values) if isinstance(self.pre, Dense) else self.source.at(entries)

    def below(self) -> Float[Tensor, " feature"]:
        """Sum over tokens of how far pre-activations are below the threshold.

        Over all places theta - h adds up to a number that needs no place by itself; places above are taken out again:
        relu(theta - h) = (theta - h) + relu(h - theta).
        """
        threshold = self.source.log_threshold.exp()
        if self.ranked or isinstance(self.pre, Dense):
            return (threshold - self.dense_pre).relu().sum(dim=0)
        above = self.pre.mapped(lambda pre, own: (pre - own).relu(), threshold).by_feature()
        return threshold * self.source.n_tokens - self.source.summed() + above


def together(name: str, settings: Settings) -> bool:
    """Whether sources have to be encoded together.

    The nonlinearity looks at all of them, or what it ranks over processes is to be sent at once.
    """
    over_ranks = name in RANKED and settings.parts.elsewhere(over_tokens=name in OVER_TOKENS)
    return is_import_path(name) or name in OVER_SOURCES or over_ranks


def encode(sources: Sequence[Source], name: str, settings: Settings) -> list[Encoding]:
    """Activations of sources by the nonlinearity of this name: of all of them, or one at a time if they allow it."""
    if name in ("relu", "jumprelu"):
        return [_above_threshold(source, name, settings) for source in sources]
    if is_import_path(name):
        return _of_ones_own(sources, name, settings)
    # every token's share, or on average
    dense = settings.k > settings.most * settings.parts.n_features(sources[0].n_features)
    pre: list[Tensor] = []
    chosen: list[Entries] = []
    with torch.set_grad_enabled(dense and torch.is_grad_enabled()):
        if name == "groupmax":
            pre = [source.dense() for source in sources]
            chosen = [_group_maxima(one, settings) for one in pre]
        else:
            pre, chosen = _ranked(sources, name, settings, keep=dense)
    if dense:
        return [_kept(*parts) for parts in zip(sources, pre, chosen, strict=True)]
    return [
        _few_places(source, entries, "relu", settings, ranked=True)
        for source, entries in zip(sources, chosen, strict=True)
    ]


def _of_ones_own(sources: Sequence[Source], name: str, settings: Settings) -> list[Encoding]:
    """Somebody else's function, which sees all sources at once and may have a gradient where it is zero."""
    pre = [source.dense() for source in sources]
    log_threshold = torch.stack([source.log_threshold for source in sources])
    a = find_nonlinearity(name)(torch.stack(pre, dim=1), log_threshold, settings)
    # their gradients are put together once; by index each would be put among zeros
    return [Encoding(source, Dense(h), Dense(own)) for source, h, own in zip(sources, pre, a.unbind(1), strict=True)]


def _kept(source: Source, pre: Tensor, entries: Entries) -> Encoding:
    mask = torch.zeros_like(pre, dtype=torch.bool).index_put_((entries.token, entries.feature), torch.tensor(True))
    return Encoding(source, Dense(pre), Dense(pre * mask), ranked=True)


def _few_places(source: Source, entries: Entries, name: str, settings: Settings, *, ranked: bool = False) -> Encoding:
    pre = Sparse(entries, source.at(entries))
    a = _activated(pre, source, name, settings, below=float(settings.band_stride))
    return Encoding(source, pre, a, ranked=ranked)


def _activated(pre: Operand, source: Source, name: str, settings: Settings, *, below: float = 1.0) -> Operand:
    if name == "relu":
        return pre.mapped(torch.relu)

    def function(values: Tensor, log_threshold: Tensor) -> Tensor:
        return jumprelu(values, log_threshold, settings.bandwidth, settings.derivative, settings.pass_through, below)

    return pre.mapped(function, source.log_threshold)


def _above_threshold(source: Source, name: str, settings: Settings) -> Encoding:
    """ReLU or JumpReLU; how many places matter is known when they have been counted."""
    threshold = source.log_threshold.detach().exp()
    floor = threshold - settings.bandwidth / 2 if name == "jumprelu" else torch.zeros_like(threshold)
    most = settings.most * source.n_tokens * source.n_features
    fused = most > 0 and _has_kernel(source)
    some = name == "jumprelu" and settings.band_stride > 1
    if fused:
        found = _above(source, floor, int(most))
        if found is not None and some:
            active = source.at(found).detach() > threshold[found.feature]
            found = found.kept(active | _seen(source.n_tokens, settings, active.device)[found.token])
        if found is not None:
            return _few_places(source, found, name, settings)
    pre = source.dense()
    if most >= 0 and not fused:
        kept = pre.detach() > floor
        if some:
            kept &= (pre.detach() > threshold) | _seen(source.n_tokens, settings, kept.device)[:, None]
        if int(kept.count_nonzero()) <= most:
            return _few_places(source, places(kept), name, settings)
    return Encoding(source, Dense(pre), _activated(Dense(pre), source, name, settings))


def _has_kernel(source: Source) -> bool:
    """Whether the product and the comparison are one kernel: on a GPU, of one product."""
    return source.bias.is_cuda and len(source.inputs) == 1


def _above(source: Source, floor: Tensor, most: int) -> Entries | None:
    """Places above the floor by a kernel that keeps no matrix; None if there are more than `most`."""
    feature, offsets = operators.above(source.inputs[0], source.weights[0], source.bias, floor, most)
    return None if int(offsets[-1]) > most else Entries(feature, offsets, source.n_features)


def _seen(n_tokens: int, settings: Settings, device: torch.device) -> Bool[Tensor, " token"]:
    """Tokens on which the kernel is evaluated below the threshold."""
    return torch.arange(n_tokens, device=device) % settings.band_stride == settings.band_offset


@torch.no_grad()
def _group_maxima(pre: Float[Tensor, "token feature"], settings: Settings) -> Entries:
    """The largest of each of k groups of consecutive features, where it is positive."""
    n_tokens, n_features = pre.shape
    member = settings.parts.n_features(n_features) // round(settings.k)
    largest = pre.unflatten(1, (-1, member)).max(dim=2)
    token, group = (largest.values > 0).nonzero().unbind(1)
    return from_places(token, group * member + largest.indices[token, group], n_tokens, n_features)


def _ranked(
    sources: Sequence[Source], name: str, settings: Settings, *, keep: bool
) -> tuple[list[Float[Tensor, "token feature"]], list[Entries]]:
    """What a top-k kind keeps of each source: candidates of each, ranked in rows.

    A row is what competes for k places: a token of a source, a token, the tokens of a source, or everything.

    Args:
        sources: Of which candidates are taken one after the other.
        name: The nonlinearity.
        settings: Its own.
        keep: Whether pre-activations of all places are wanted too.
    """
    over_tokens, over_sources = name in OVER_TOKENS, name in OVER_SOURCES
    n_tokens, parts = sources[0].n_tokens, settings.parts
    k = settings.k * (len(sources) if over_sources else 1) * (parts.n_tokens(n_tokens) if over_tokens else 1)
    pre: list[Tensor] = []
    found: list[tuple[Entries, Tensor]] = []
    for source in sources:
        here = source.dense()
        found.append(_candidates(here.detach(), round(k), over_tokens=over_tokens))
        pre += [here] if keep else []
        # one matrix at a time
        del here
    return pre, _chosen(found, name, settings, round(k))


def _candidates(
    pre: Float[Tensor, "token feature"], k: int, *, over_tokens: bool
) -> tuple[Entries, Float[Tensor, " entry"]]:
    """Places among which a source's k largest of each token are, or of the batch; with their pre-activations."""
    n_tokens, n_features = pre.shape
    flat = candidates(pre.view(1, -1) if over_tokens else pre, max(1, k))
    return from_places(flat // n_features, flat % n_features, n_tokens, n_features), pre.view(-1)[flat]


@torch.no_grad()
def _chosen(
    found: Sequence[tuple[Entries, Float[Tensor, " _"]]], name: str, settings: Settings, k: int
) -> list[Entries]:
    """The k largest of each row among candidates."""
    parts, n_sources, n_tokens = settings.parts, len(found), found[0][0].n_tokens
    n_features = parts.n_features(found[0][0].n_features)
    index = torch.cat([torch.full_like(entries.feature, number) for number, (entries, _) in enumerate(found)])
    token = torch.cat([entries.token for entries, _ in found])
    feature = torch.cat([entries.feature for entries, _ in found]) + parts.first
    values = torch.cat([own for _, own in found])
    row, rows = {
        "topk": (index * n_tokens + token, n_sources * n_tokens),
        "token_topk": (token, n_tokens),
        "batch_topk": (index, n_sources),
        "batch_topk_all": (torch.zeros_like(index), 1),
    }[name]
    # of equal numbers of a row the first is kept, by token, then source, then feature
    place = (token * n_sources + index) * n_features + feature
    in_order = None
    if name in OVER_SOURCES and len(place):
        in_order = torch.argsort(row * (int(place.max()) + 1) + place)
    column = _columns(row, rows, in_order)
    shape = (rows, int(column.max()) + 1 if len(column) else 1)

    def placed(what: Tensor) -> Shaped[Tensor, "row column"]:
        return what.new_zeros(shape).index_put((row, column), what)

    over_tokens = name in OVER_TOKENS
    kept = parts.largest(placed(values), k, lambda: placed(place), over_tokens=over_tokens)[row, column]
    masks = kept.split([len(entries) for entries, _ in found])
    return [entries.kept(mask) for (entries, _), mask in zip(found, masks, strict=True)]


def _columns(row: Int[Tensor, " entry"], rows: int, order: Int[Tensor, " entry"] | None) -> Int[Tensor, " entry"]:
    """How many entries of the same row come before each; they are in order, or their order is given."""
    counts = torch.bincount(row, minlength=rows)
    starts = (counts.cumsum(dim=0) - counts).repeat_interleave(counts, output_size=len(row))
    position = torch.arange(len(row), device=row.device) - starts
    return position if order is None else torch.empty_like(position).index_put((order,), position)
