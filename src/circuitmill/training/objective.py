"""The loss of one batch as a sum of named terms.

Encoders run once and, if the nonlinearity allows, source by source, so that what is alive at a time stays in the
processor's cache; decoder norms are computed once; each source is multiplied with all its targets at once.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core.decoders import spans_of
from circuitmill.core.losses import Evaluation, find_term
from circuitmill.core.nonlinearity import NONLINEARITIES, Nonlinearity, Settings, find_nonlinearity, jumprelu
from circuitmill.core.operand import Dense, Operand
from circuitmill.core.transcoder import Transcoder
from circuitmill.kernels import sparse
from circuitmill.training import schedules


@dataclass(frozen=True)
class BatchResult:
    """Loss and by-products of one batch."""

    terms: dict[str, Float[Tensor, ""]]
    """Unweighted terms, by name."""
    loss: Float[Tensor, ""]
    """The weighted sum of the terms; what is differentiated."""
    y_hat: Float[Tensor, "token layer d_model"]
    """The reconstruction, detached."""
    firings: Int[Tensor, "source feature"]
    """Tokens on which each feature fired."""
    least: Float[Tensor, " source"]
    """The smallest activation above zero, by source; infinity if there is none."""

    @property
    def l0(self) -> Float[Tensor, " source"]:
        """Mean number of features firing on a token."""
        return self.firings.sum(dim=1) / self.y_hat.shape[0]


@dataclass(frozen=True)
class Moment:
    """What changes during the training, at one time."""

    tokens: int
    """Seen at the end of the step."""
    dead: Bool[Tensor, "source feature"]
    density: Float[Tensor, "source feature"]


def settings_at(cfg: TrainConfig, tokens: int) -> Settings:
    """The nonlinearity's settings after so many tokens."""
    own = cfg.nonlinearity
    k = schedules.interpolate(tokens, start=own.k_start or own.k, final=own.k, over=own.k_ramp_share * cfg.tokens)
    return Settings(k, own.bandwidth, own.threshold_derivative, own.pass_through)


def coefficients_at(cfg: TrainConfig, tokens: int) -> dict[str, float]:
    """The terms' coefficients after so many tokens."""
    return {
        name: schedules.interpolate(tokens, start=0.0, final=term.coefficient, over=term.ramp_share * cfg.tokens)
        for name, term in cfg.active_terms().items()
    }


def evaluate_batch(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    y: Float[Tensor, "token layer d_model"],
    cfg: TrainConfig,
    moment: Moment,
) -> BatchResult:
    """Run a transcoder on a batch of normalised inputs and outputs."""
    batch = evaluation(transcoder, x, y, cfg, moment)
    coefficients = coefficients_at(cfg, moment.tokens)
    terms = {name: find_term(name)(batch, cfg.loss[name]) for name in coefficients}
    return BatchResult(
        terms={name: term.detach() for name, term in terms.items()},
        loss=torch.stack([coefficients[name] * term for name, term in terms.items()]).sum(),
        y_hat=batch.y_hats[-1].detach(),
        firings=torch.stack([a.firings() for a in batch.a]),
        least=torch.stack([_least(a) for a in batch.a]),
    )


def evaluation(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    y: Float[Tensor, "token layer d_model"],
    cfg: TrainConfig,
    moment: Moment,
) -> Evaluation:
    """Pre-activations, activations and reconstructions of a batch, ready for terms of the loss."""
    settings = settings_at(cfg, moment.tokens)
    spans = spans_of(cfg.architecture.prefixes, cfg.n_features)
    pre, operands, written = [], [], []
    row = find_nonlinearity(cfg.nonlinearity.name)
    if row.scope == "all":
        pre = [transcoder.pre_activations_source(source, x) for source in range(transcoder.n_sources)]
        together = row.apply(torch.stack(pre, dim=1), transcoder.log_threshold, settings)
        operands = [_operand(together[:, source]) for source in range(transcoder.n_sources)]
    for source in range(transcoder.n_sources):
        if row.scope == "source":
            pre.append(transcoder.pre_activations_source(source, x))
            operands.append(_activated(row, pre[source], transcoder.log_threshold[source], settings))
        written.append(
            [transcoder.decoder.written(source, operands[source].within(span), x[:, source], span) for span in spans]
        )
    y_hats = _reconstructions(transcoder, x, written)
    return Evaluation(transcoder, x, y, pre, operands, y_hats, settings, moment.dead, moment.density)


def _activated(
    row: Nonlinearity,
    pre: Float[Tensor, "token feature"],
    log_threshold: Float[Tensor, " feature"],
    settings: Settings,
) -> Operand:
    """Activations of one source, by the cheaper of two equal ways."""
    if row is NONLINEARITIES["jumprelu"] and pre.device.type == "cpu":
        entries = sparse.places(pre.detach() > log_threshold.detach().exp() - settings.bandwidth / 2)
        if entries.flat.shape[0] <= sparse.WORTHWHILE * pre.numel():
            here = log_threshold[entries.feature]
            values = jumprelu(entries.gather(pre), here, settings.bandwidth, settings.derivative, settings.pass_through)
            return sparse.Sparse(entries, values)
        return Dense(jumprelu(pre, log_threshold, settings.bandwidth, settings.derivative, settings.pass_through))
    return _operand(row.apply(pre[:, None], log_threshold[None], settings)[:, 0])


def _operand(a: Float[Tensor, "token feature"]) -> Operand:
    """Activations that get a gradient only where they are above zero, dense or as the places where they are."""
    if a.device.type == "cpu":
        entries = sparse.places(a.detach() > 0)
        if entries.flat.shape[0] <= sparse.WORTHWHILE * a.numel():
            return sparse.Sparse(entries, entries.gather(a))
    return Dense(a)


def _reconstructions(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    written: list[list[Float[Tensor, "token _ d_model"]]],
) -> list[Float[Tensor, "token layer d_model"]]:
    """What each Matryoshka prefix reconstructs: every stretch of features is decoded once and added to those before.

    The biases and the skip connection are in every prefix.
    """
    so_far = [parts[0] for parts in written]
    found = [transcoder.add_up(so_far, x)]
    for index in range(1, len(written[0])):
        so_far = [before + parts[index] for before, parts in zip(so_far, written, strict=True)]
        found.append(transcoder.add_up(so_far, x))
    return found


def _least(a: Operand) -> Float[Tensor, ""]:
    values = a.values.detach() if isinstance(a, sparse.Sparse | Dense) else a.dense().detach()
    positive = values[values > 0]
    return positive.min() if len(positive) else values.new_tensor(torch.inf)
