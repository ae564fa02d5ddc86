"""The loss of one batch as named terms.

    L = sum_m ||y^m - yhat^m||^2  +  lambda(t) sum tanh(c norm a)  +  lambda_P sum relu(theta - h) norm
        + alpha ||e - ehat_dead||^2,

means over tokens. Encoders run once and layer by layer, so that what is alive at a time stays in the
processor's cache; decoder norms are computed once; each source is multiplied with all its targets at once.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core import losses
from circuitmill.core.nonlinearity import jumprelu
from circuitmill.core.transcoder import Transcoder
from circuitmill.kernels import sparse


@dataclass(frozen=True)
class BatchResult:
    """Loss and by-products of one batch."""

    terms: dict[str, Float[Tensor, ""]]
    """Unweighted terms, by name."""
    loss: Float[Tensor, ""]
    """The weighted sum of the terms; what is differentiated."""
    y_hat: Float[Tensor, "token layer d_model"]
    """The reconstruction, detached."""
    fired: Bool[Tensor, "layer feature"]
    """Which features fired on any of the tokens."""
    l0: Float[Tensor, " layer"]
    """Mean number of features firing on a token."""


@dataclass(frozen=True)
class LayerResult:
    """What one layer contributes."""

    written: Float[Tensor, "token target d_model"]
    sparsity: Float[Tensor, ""]
    fired: Bool[Tensor, " feature"]
    l0: Float[Tensor, ""]


def evaluate_batch(
    transcoder: Transcoder,
    x: Float[Tensor, "token layer d_model"],
    y: Float[Tensor, "token layer d_model"],
    cfg: TrainConfig,
    *,
    sparsity: float,
    dead: Bool[Tensor, "layer feature"],
) -> BatchResult:
    """Run a transcoder on a batch of normalised inputs and outputs.

    Args:
        sparsity: Present coefficient of the sparsity term.
        dead: Features that the auxiliary term asks to explain the error.
    """
    norms, threshold = transcoder.decoder_norms(), transcoder.threshold
    results, pres = [], []
    lift = x.new_zeros(())
    for layer in range(transcoder.n_layers):
        pre = transcoder.pre_activations_layer(layer, x[:, layer])
        results.append(_layer(transcoder, layer, pre, norms[layer], cfg))
        if cfg.loss.pre_activation:
            lift = lift + losses.pre_activation(pre, threshold[layer], norms[layer])
        pres.append(pre)
    y_hat = transcoder.add_up([result.written for result in results])
    rest = x.new_zeros(())
    if cfg.loss.auxiliary and dead.any():
        rest = auxiliary_term(transcoder, pres, y - y_hat, dead, cfg.loss.auxiliary_k)
    weighted = {
        "reconstruction": (losses.reconstruction(y, y_hat), 1.0),
        "sparsity": (torch.stack([result.sparsity for result in results]).sum(), sparsity),
        "pre_activation": (lift, cfg.loss.pre_activation),
        "auxiliary": (rest, cfg.loss.auxiliary),
    }
    return BatchResult(
        terms={name: term.detach() for name, (term, _) in weighted.items()},
        loss=torch.stack([coefficient * term for term, coefficient in weighted.values()]).sum(),
        y_hat=y_hat.detach(),
        fired=torch.stack([result.fired for result in results]),
        l0=torch.stack([result.l0 for result in results]),
    )


def _layer(
    transcoder: Transcoder,
    layer: int,
    pre: Float[Tensor, "token feature"],
    norms: Float[Tensor, " feature"],
    cfg: TrainConfig,
) -> LayerResult:
    """Nonlinearity, sparsity and decoder of one layer, by the cheaper of two equal ways."""
    log_threshold = transcoder.log_threshold[layer]
    scale, n_tokens = cfg.loss.sparsity_scale, pre.shape[0]
    if pre.device.type == "cpu":
        entries = sparse.places_above(pre, log_threshold.detach().exp() - cfg.bandwidth / 2)
        if entries.flat.shape[0] <= sparse.WORTHWHILE * pre.numel():
            index = entries.feature
            a = jumprelu(entries.gather(pre), log_threshold[index], cfg.bandwidth, cfg.threshold_derivative)
            return LayerResult(
                written=sparse.decode_entries(entries, a, transcoder.W_dec[layer]),
                sparsity=torch.tanh(a * (norms[index] * scale)).sum() / n_tokens,
                fired=sparse.fired(entries, a.detach()),
                l0=(a.detach() > 0).sum() / n_tokens,
            )
    a = jumprelu(pre, log_threshold, cfg.bandwidth, cfg.threshold_derivative)
    fires = a.detach() > 0
    return LayerResult(
        written=transcoder.decode_layer(layer, a),
        sparsity=losses.tanh_sparsity(a, norms, scale),
        fired=fires.any(dim=0),
        l0=fires.sum() / n_tokens,
    )


def auxiliary_term(
    transcoder: Transcoder,
    pres: list[Float[Tensor, "token feature"]],
    error: Float[Tensor, "token layer d_model"],
    dead: Bool[Tensor, "layer feature"],
    k: int,
) -> Float[Tensor, ""]:
    """The error that the dead features leave, weighted down while fewer than k per layer are dead.

    Only dead rows of encoder and decoder take part, so the cost is in proportion to their number.
    """
    written = []
    for layer, pre in enumerate(pres):
        chosen = dead[layer].nonzero().flatten()
        a = losses.strongest(pre[:, chosen], k)
        block = transcoder.W_dec[layer][chosen]
        written.append((a @ block.flatten(1)).view(a.shape[0], *block.shape[1:]))
    error_hat = transcoder.add_up(written) - transcoder.b_dec
    weight = min(1.0, float(dead.sum()) / (k * transcoder.n_layers))
    return weight * losses.auxiliary(error, error_hat)
