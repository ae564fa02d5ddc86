"""The loss of one batch as a sum of named terms.

Encoders run once and, if the nonlinearity allows, source by source, so that what is alive at a time stays in the
processor's cache; decoder norms are computed once; each source is multiplied with all its targets at once.

Terms that need the language model come from whoever runs it (`WholeSequences`), so that nothing here does. Where ranks
share features or tokens, what is summed and ranked over all of them comes from `core.parts.Parts`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.config.train import END_TO_END, TERMS, TrainConfig
from circuitmill.core.encoding import Encoding, Source, encode, sources_of, together
from circuitmill.core.losses import Evaluation, find_term, reconstruction
from circuitmill.core.nonlinearity import Settings
from circuitmill.core.operand import Dense, Operand
from circuitmill.core.parts import WHOLE, Parts, spans_of
from circuitmill.core.reconstruction import Reconstruction
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.kernels.sparse import WORTHWHILE, Sparse
from circuitmill.training import schedules

CPU = torch.device("cpu")
Encode = Callable[[int, Float[Tensor, "token d_model"]], Operand]
"""From a source and its normalised inputs to activations, by the nonlinearity that trains."""


@runtime_checkable
class WholeSequences(Protocol):
    """A part of a batch whose tokens are whole sequences, with the language model that reads them."""

    @property
    def share(self) -> float:
        """Tokens in this part, relative to an equal share of the batch.

        BOS counts for nothing, so that parts of as many sequences have different numbers of tokens. With the share as
        a factor, the mean of a term over the parts is the term of the whole batch.
        """
        ...

    def terms(
        self, transcoder: Transcoder, encode: Encode, names: Collection[str], parts: Parts
    ) -> dict[str, Float[Tensor, ""]]:
        """End-to-end terms by name, of which the mean over the parts is the term of the whole batch."""
        ...


@dataclass(frozen=True)
class BatchResult:
    """Loss and by-products of one batch."""

    terms: dict[str, Float[Tensor, ""]]
    """Unweighted terms, by name; of the features here if the term is a sum over features."""
    weighted: dict[str, Float[Tensor, ""]]
    """The same, times their coefficients."""
    kinds: dict[str, str]
    """What each term is."""
    loss: Float[Tensor, ""]
    """The sum of the weighted terms; what is differentiated."""
    y: Float[Tensor, "token layer d_model"]
    """What was to be reconstructed."""
    y_hat: Float[Tensor, "token layer d_model"]
    """The reconstruction, detached."""
    firings: Int[Tensor, "source feature"]
    """Tokens on which each feature fired."""
    least: Float[Tensor, " source"]
    """The smallest activation above zero, by source; infinity if there is none."""
    sparse: tuple[bool, ...]
    """Whether only few places were worked on, by source."""

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
    n_dead: int | None = None
    """Dead features over all ranks; None if those here are all."""


def settings_at(cfg: TrainConfig, tokens: int, parts: Parts = WHOLE, device: torch.device = CPU) -> Settings:
    """The nonlinearity's settings after so many tokens."""
    own = cfg.nonlinearity
    most = {"auto": WORTHWHILE[device.type], "dense": -1.0, "sparse": 1.0}[cfg.products]
    return Settings(
        k=schedules.interpolate(tokens, start=own.k_start or own.k, final=own.k, over=own.k_ramp_share * cfg.tokens),
        bandwidth=own.bandwidth,
        derivative=own.threshold_derivative,
        pass_through=own.pass_through,
        parts=parts,
        band_stride=own.band_stride,
        # every token of a batch in turn
        band_offset=tokens // cfg.batch_tokens % own.band_stride,
        most=most,
    )


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
    whole: WholeSequences | None = None,
    parts: Parts = WHOLE,
) -> BatchResult:
    """Run a transcoder on a batch of normalised inputs and outputs.

    Args:
        transcoder: In normalised units.
        x: Inputs, BOS excluded.
        y: Outputs of the same tokens.
        cfg: Terms and nonlinearity.
        moment: Of the training.
        whole: The sequences that the tokens are from; end-to-end terms need it.
        parts: Where other features and other tokens are.

    Raises:
        ShapeError: it is needed and missing.
    """
    with transcoder.decoder.opened():
        batch = evaluation(transcoder, x, y, cfg, moment, parts)
        terms = _terms(batch, cfg, moment, whole)
    coefficients = coefficients_at(cfg, moment.tokens)
    weighted = {
        name: coefficients[name] * term * _balance(name, term, batch, cfg, whole) for name, term in terms.items()
    }
    return BatchResult(
        terms={name: term.detach() for name, term in terms.items()},
        weighted={name: term.detach() for name, term in weighted.items()},
        kinds={name: term.term or name for name, term in cfg.active_terms().items()},
        loss=torch.stack(list(weighted.values())).sum(),
        y=y,
        y_hat=batch.y_hats[-1].detach(),
        firings=torch.stack([a.firings() for a in batch.a]),
        least=torch.stack([_least(a) for a in batch.a]),
        sparse=tuple(encoding.sparse for encoding in batch.encodings),
    )


def _terms(
    batch: Evaluation, cfg: TrainConfig, moment: Moment, whole: WholeSequences | None
) -> dict[str, Float[Tensor, ""]]:
    """Active terms by name, in the order of the configuration."""
    kinds = {name: term.term or name for name, term in cfg.active_terms().items()}
    asked = sorted(set(kinds.values()) & set(END_TO_END))
    through_model: dict[str, Tensor] = {}
    if asked and whole is None:
        raise ShapeError(
            f"whole sequences for {', '.join(asked)}",
            found="tokens without the sequences that they are from",
            where="train.loss",
            fix="train on a source of whole sequences, or leave these terms out",
        )
    if asked and whole is not None:
        encode = encoder(batch.transcoder, cfg, moment, batch.parts)
        through_model = whole.terms(batch.transcoder, encode, asked, batch.parts)
    share = 1.0 if whole is None else whole.share
    return {
        name: through_model[kind] if kind in through_model else share * find_term(kind)(batch, cfg.loss[name])
        for name, kind in kinds.items()
    }


def _balance(
    name: str, value: Float[Tensor, ""], batch: Evaluation, cfg: TrainConfig, whole: WholeSequences | None
) -> Float[Tensor, ""] | float:
    """A factor besides the coefficient: with `balance`, reconstruction / value, without a gradient of its own.

    It is of the micro-batch, over all ranks. A value that is not above zero, as that of a perfect replacement, has no
    gradient either and gets the factor zero.
    """
    term = cfg.loss[name]
    if (term.term or name) not in END_TO_END or not term.balance:
        return 1.0
    share = 1.0 if whole is None else whole.share
    with torch.no_grad():
        both = torch.stack([share * reconstruction(batch, term), value.detach()])
        target, over_all = batch.parts.over_tokens(both)
        return torch.where(over_all > 0, target / over_all, 0.0)


def encoder(transcoder: Transcoder, cfg: TrainConfig, moment: Moment, parts: Parts = WHOLE) -> Encode:
    """Activations of one source from the one layer that it reads, as `evaluation` computes them."""
    settings = settings_at(cfg, moment.tokens, parts, transcoder.b_enc.device)
    weights, biases = transcoder.W_enc.unbind(0), transcoder.b_enc.unbind(0)

    def encode_layer(source: int, x: Float[Tensor, "token d_model"]) -> Operand:
        own = Source([parts.spread(x)], [weights[source]], biases[source], transcoder.log_threshold[source])
        return encode([own], cfg.nonlinearity.name, settings)[0].a

    return encode_layer


def evaluation(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    y: Float[Tensor, "token layer d_model"],
    cfg: TrainConfig,
    moment: Moment,
    parts: Parts = WHOLE,
) -> Evaluation:
    """Pre-activations, activations and reconstructions of a batch, ready for terms of the loss."""
    name, settings = cfg.nonlinearity.name, settings_at(cfg, moment.tokens, parts, x.device)
    sources = sources_of(transcoder, x)
    groups = [sources] if together(name, settings) else [[source] for source in sources]
    reconstruction = Reconstruction(transcoder, x, spans_of(cfg.architecture.prefixes, cfg.n_features), parts)
    encodings: list[Encoding] = []
    norms: dict[str, list[Tensor]] = {kind: [] for kind in _norms_of(cfg)}
    for group in groups:
        for encoding in encode(group, name, settings):
            # beside the source's product, so that both gradients of its decoder are made one after the other
            for kind, found in norms.items():
                found.append(transcoder.decoder_norm(len(encodings), kind))
            reconstruction.write(len(encodings), encoding.a)
            encodings.append(encoding)
    return Evaluation(
        transcoder,
        x,
        y,
        encodings,
        reconstruction.finish(),
        settings,
        moment.dead,
        moment.density,
        n_dead=moment.n_dead,
        known_norms={kind: torch.stack(found) for kind, found in norms.items()},
    )


def _norms_of(cfg: TrainConfig) -> list[str]:
    """Kinds of decoder norms that terms of the loss weigh features with."""
    weighing = [term for name, term in cfg.active_terms().items() if "norm" in TERMS.get(term.term or name, ())]
    return sorted({term.norm or "concatenated" for term in weighing})


def _least(a: Operand) -> Float[Tensor, ""]:
    values = a.values.detach() if isinstance(a, Sparse | Dense) else a.dense().detach()
    positive = values[values > 0]
    return positive.min() if len(positive) else values.new_tensor(torch.inf)
