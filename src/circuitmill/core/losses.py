"""Terms of the training loss. Each is summed over d_model, layers and features and averaged over tokens.

With that reduction a coefficient means the same at any batch size, and the mean of a term over equal parts of a batch
is the term of the whole batch. A term is a function of `Evaluation` and its options, and a row of `TERMS`;
coefficients and their ramps are the caller's.

| term | formula | source |
|---|---|---|
| reconstruction | sum_m (y^m - yhat^m)^2, mean over Matryoshka prefixes | Ameisen et al. 2025; Bussmann et al. 2025 |
| tanh_sparsity | sum_i tanh(scale n_i a_i) | "Circuit Tracing" (Ameisen et al. 2025) |
| l1 | sum_i n_i a_i | "Circuits Updates, April 2024" |
| quadratic_l0 | sum_s (L0^s / target - 1)^2, per token | "Jumping Ahead" (Rajamanoharan et al. 2024), appendix |
| frequency | sum_i (density_i / scale) H(h_i - theta_i) | after Gemma Scope 2's penalty of frequent features |
| pre_activation | sum_i relu(theta_i - h_i) n_i | "Circuits Updates, January 2025" |
| auxiliary | (e - ehat_dead)^2 | Gao et al. 2024, section 2.4 |

n_i is what a feature writes (`Transcoder.decoder_norms`).

Where other processes have other features (`core.parts`), the terms in `PARTIAL` are of the features here, and the term
is the sum over processes; all others are the same everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitmill.config.names import require_known
from circuitmill.config.train import TermConfig
from circuitmill.core.encoding import Encoding
from circuitmill.core.imports import function_at
from circuitmill.core.nonlinearity import Settings, step
from circuitmill.core.operand import Operand
from circuitmill.core.parts import Parts
from circuitmill.core.transcoder import Transcoder
from circuitmill.kernels.entries import Entries, from_places
from circuitmill.kernels.sparse import Sparse


@dataclass(frozen=True)
class Evaluation:
    """A batch seen by a transcoder: what a term is computed from."""

    transcoder: Transcoder
    x: Float[Tensor, "token layer d_model"]
    """Normalised inputs."""
    y: Float[Tensor, "token layer d_model"]
    """Normalised outputs."""
    encodings: list[Encoding]
    """Pre-activations and activations, by source."""
    y_hats: list[Float[Tensor, "token layer d_model"]]
    """Reconstructions by each Matryoshka prefix; the last one by all features."""
    settings: Settings
    dead: Bool[Tensor, "source feature"]
    """Features without a firing for long."""
    density: Float[Tensor, "source feature"]
    """Running share of tokens on which each feature fires."""
    n_dead: int | None = None
    """Their number, those of other processes included; None if there are no others."""
    known_norms: dict[str, Float[Tensor, "source feature"]] = field(default_factory=dict)
    """What features write (`Transcoder.decoder_norms`), by kind, as far as it has been computed already."""

    @property
    def a(self) -> list[Operand]:
        """Activations, by source."""
        return [encoding.a for encoding in self.encodings]

    @property
    def pre(self) -> list[Float[Tensor, "token feature"]]:
        """Pre-activations of all places, by source; computed for who asks, where only few places are worked on."""
        return [encoding.dense_pre for encoding in self.encodings]

    @property
    def parts(self) -> Parts:
        """Where the other features are."""
        return self.settings.parts

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch."""
        return self.x.shape[0]

    @cached_property
    def norms(self) -> Float[Tensor, "source feature"]:
        """Concatenated decoder norms."""
        return self._norms("concatenated")

    @cached_property
    def summed_norms(self) -> Float[Tensor, "source feature"]:
        """Sums of decoder norms over targets."""
        return self._norms("summed")

    def _norms(self, kind: str) -> Float[Tensor, "source feature"]:
        known = self.known_norms.get(kind)
        return self.transcoder.decoder_norms(kind) if known is None else known

    def weights(self, term: TermConfig) -> Float[Tensor, "source feature"]:
        """What each feature writes, and zero for the features that a term is not about."""
        norms = self.summed_norms if term.norm == "summed" else self.norms
        if term.features in (None, "all"):
            return norms
        shared = torch.arange(norms.shape[1], device=norms.device) < self.transcoder.architecture.shared
        return norms * (shared if term.features == "shared" else ~shared)


Term = Callable[[Evaluation, TermConfig], Float[Tensor, ""]]


def squared_error(
    y: Float[Tensor, "token layer d_model"], y_hat: Float[Tensor, "token layer d_model"]
) -> Float[Tensor, ""]:
    """Mean over tokens of sum over layers of ||y - yhat||^2.

    >>> squared_error(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    tensor(12.)
    """
    return (y - y_hat).square().sum() / y.shape[0]


def reconstruction(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """Squared error, averaged over Matryoshka prefixes."""
    return torch.stack([squared_error(batch.y, y_hat) for y_hat in batch.y_hats]).mean()


def tanh_sparsity(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """A smooth count of active features.

    With norms in it, shrinking activations and growing decoders does not pay. `scale` is the reciprocal of the written
    length that counts as active.
    """
    weights = batch.weights(term) * (term.scale or 1.0)
    return _over_sources(batch, torch.tanh, weights)


def l1(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """Written length, added up over features.

    Activations are not negative. An absolute value would have no derivative at zero, where a feature that is just below
    its threshold gets half of the straight-through estimate.
    """
    return _over_sources(batch, lambda written: written, batch.weights(term))


def _over_sources(batch: Evaluation, function: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    parts = [a.total(function, weight) for a, weight in zip(batch.a, weights, strict=True)]
    return torch.stack(parts).sum() / batch.n_tokens


def quadratic_l0(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """Distance of each token's number of active features from a target, relative to it, squared; by source.

    The gradient is the threshold's straight-through estimate.
    """
    steps = torch.stack([_steps(batch, encoding).by_token() for encoding in batch.encodings])
    return (batch.parts.total(steps, exact=True) / (term.target or 1.0) - 1).square().sum() / batch.n_tokens


def frequency(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """Firing, weighed by how often the feature fires anyhow.

    The running density stands for the batch's own, of which the penalty is a square, so that the term does not depend
    on how a batch is split.
    """
    weights = batch.density / (term.scale or 1.0)
    losses = [
        (_steps(batch, encoding).by_feature() * weight).sum()
        for encoding, weight in zip(batch.encodings, weights, strict=True)
    ]
    return torch.stack(losses).sum() / batch.n_tokens


def _steps(batch: Evaluation, encoding: Encoding) -> Operand:
    settings = batch.settings
    below = float(settings.band_stride) if encoding.sparse else 1.0

    def function(pre: Tensor, log_threshold: Tensor) -> Tensor:
        return step(pre, log_threshold, settings.bandwidth, settings.derivative, below)

    return encoding.pre.mapped(function, encoding.source.log_threshold)


def pre_activation(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """Lifts features that do not fire.

    The norms are weights here and receive no gradient: otherwise the term is also lowered by shrinking the decoders of
    rare features, which then fire and write nothing.
    """
    weights = batch.weights(term).detach()
    parts = [(encoding.below() * weight).sum() for encoding, weight in zip(batch.encodings, weights, strict=True)]
    return torch.stack(parts).sum() / batch.n_tokens


def auxiliary(batch: Evaluation, term: TermConfig) -> Float[Tensor, ""]:
    """What the strongest dead features leave of the error that they are asked to explain.

    It is weighted down while fewer than k per source are dead, and not divided by the batch's error, which would make
    it depend on how a batch is split.
    """
    k = term.k or 1
    n_dead = int(batch.dead.sum()) if batch.n_dead is None else batch.n_dead
    if not n_dead:
        return batch.x.new_zeros(())
    coder = batch.transcoder
    error = (batch.y - batch.y_hats[-1]).detach()
    explained = torch.zeros_like(error)
    for source, encoding in enumerate(batch.encodings):
        entries = strongest(encoding, k, batch.dead[source], batch.parts)
        a = Sparse(entries, encoding.at(entries).relu())
        written = coder.decoder.written(source, a, batch.x[:, source])
        explained = explained.index_add(1, _targets(coder, source, error.device), written.to(error.dtype))
    weight = min(1.0, n_dead / (k * coder.n_sources))
    return weight * squared_error(error, batch.parts.total(explained))


@torch.no_grad()
def strongest(encoding: Encoding, k: int, allowed: Bool[Tensor, " feature"], parts: Parts) -> Entries:
    """The k largest positive pre-activations of each token among the allowed features.

    Args:
        encoding: Of a source.
        k: Of all processes that have features of the source.
        allowed: Of the features here.
        parts: Where the others are.
    """
    chosen = allowed.nonzero().flatten()
    values, index = encoding.of(chosen).relu().topk(min(k, len(chosen)), dim=1)
    feature = chosen[index]
    kept = parts.largest(values, k, lambda: feature + parts.first) & (values > 0)
    token = torch.arange(len(values), device=values.device)[:, None].expand_as(feature)
    ordered = (token[kept] * len(allowed) + feature[kept]).sort().values
    return from_places(ordered // len(allowed), ordered % len(allowed), len(values), len(allowed))


def _targets(coder: Transcoder, source: int, device: torch.device) -> Tensor:
    return torch.tensor(coder.topology.writes[source], device=device)


TERMS: dict[str, Term] = {
    "reconstruction": reconstruction,
    "tanh_sparsity": tanh_sparsity,
    "l1": l1,
    "quadratic_l0": quadratic_l0,
    "frequency": frequency,
    "pre_activation": pre_activation,
    "auxiliary": auxiliary,
}
"""Name -> function. A new one is a function of type `Term`, a row here, and its options in `config.train.TERMS`."""


PARTIAL = frozenset({"tanh_sparsity", "l1", "frequency", "pre_activation"})
"""Sums over features."""


def find_term(name: str) -> Term:
    """The row of this name, or a function elsewhere.

    Raises:
        ConfigError: no such row, then it names the nearest one; or nothing callable at the import path.
    """
    require_known(name, TERMS, f"train.loss.{name}")
    return TERMS[name] if name in TERMS else function_at(name, f"train.loss.{name}")
