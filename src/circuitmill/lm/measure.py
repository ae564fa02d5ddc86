"""A transcoder measured on the model it was trained on: fit and sparsity, and what replacing MLPs does to predictions.

Tokens come as batches of whole sequences. BOS positions count for nothing.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill.core.behaviour import Behaviour
from circuitmill.core.metrics import ExplainedVariance, Firing
from circuitmill.core.summaries import behaviour_summary
from circuitmill.core.transcoder import Transcoder
from circuitmill.lm.load import LanguageModel
from circuitmill.lm.replacement import ablated_logits, check_fits, original_logits, replacement_logits
from circuitmill.lm.sites import Sites, mlp_sites

Name = TypeVar("Name", bound=Hashable)
Batches = Iterable[Int[Tensor, "_ pos"]]
LogitsOf = Callable[[Int[Tensor, "sequence pos"]], Float[Tensor, "sequence pos d_vocab"]]


@dataclass(frozen=True)
class Fit:
    """How well a transcoder reconstructs what it writes, by layer, and with how many features, by source."""

    explained: ExplainedVariance
    firing: Firing

    @property
    def mean_outputs(self) -> Float[Tensor, "layer d_model"]:
        """The mean of what is reconstructed, of each layer over the tokens measured."""
        return self.explained.mean.float()


@torch.no_grad()
def measure_fit(lm: LanguageModel | Sites, transcoder: Transcoder, batches: Batches) -> Fit:
    """Run the model as it is and reconstruct, from what it has there, what the transcoder writes.

    Args:
        lm: A model, whose MLPs' inputs and outputs are meant, or other places of one or two: there what is read is what
            is reconstructed.
        transcoder: On the model's device.
        batches: Of tokens.

    Raises:
        ShapeError: the transcoder was made for a model of another shape.
    """
    sites = lm if isinstance(lm, Sites) else mlp_sites(lm)
    check_fits(sites, transcoder)
    fit = Fit(
        ExplainedVariance(transcoder.n_layers, transcoder.d_model, sites.device),
        Firing(transcoder.n_sources, transcoder.n_features, sites.device),
    )
    for tokens in batches:
        inputs, outputs = sites(tokens, tokens != sites.bos_id)
        x = inputs.float()
        features = transcoder.encode(x)
        fit.explained.update(x if outputs is None else outputs.float(), transcoder.decode(features, x))
        fit.firing.update(features)
    return fit


def measure_behaviour(lm: LanguageModel, models: Mapping[Name, LogitsOf], batches: Batches) -> dict[Name, Behaviour]:
    """Compare the predictions of changed models with the original's on the same tokens."""
    found = {name: Behaviour() for name in models}
    for tokens in batches:
        logits = original_logits(lm, tokens)
        for name, logits_of in models.items():
            found[name].update(logits, logits_of(tokens), tokens, lm.bos_id)
    return found


def changed_models(
    lm: LanguageModel,
    transcoder: Transcoder,
    mean: Float[Tensor, "layer d_model"],
    layers: tuple[int, ...] | None = None,
) -> dict[str, LogitsOf]:
    """The model with MLPs replaced by the transcoder, by zero and by the mean output; all of them without `layers`.

    The first raises ConfigError when it runs if the transcoder does not stand for MLPs.
    """
    zero = torch.zeros_like(mean)
    return {
        "replacement": lambda tokens: replacement_logits(lm, transcoder, tokens, layers),
        "zero_ablation": lambda tokens: ablated_logits(lm, zero, tokens, layers),
        "mean_ablation": lambda tokens: ablated_logits(lm, mean, tokens, layers),
    }


def measure_one_layer(
    lm: LanguageModel, transcoder: Transcoder, mean: Float[Tensor, "layer d_model"], batches: Batches
) -> list[dict]:
    """What replacing or ablating each layer alone does: a summary per layer."""
    models: dict[tuple[str, int], LogitsOf] = {("original", -1): lambda tokens: original_logits(lm, tokens)}
    for layer in range(lm.n_layers):
        changed = changed_models(lm, transcoder, mean, (layer,))
        models |= {(name, layer): logits_of for name, logits_of in changed.items()}
    found = measure_behaviour(lm, models, batches)
    original = found.pop(("original", -1)).cross_entropy()
    return [
        {"layer": layer}
        | behaviour_summary({name: part for (name, at), part in found.items() if at == layer}, original)
        for layer in range(lm.n_layers)
    ]


def measure_replacement(lm: LanguageModel, transcoder: Transcoder, batches: Batches) -> dict[str, float | None]:
    """The replacement model in three figures: agreement, KL in nats, share of cross-entropy recovered from zeros."""
    mean = torch.zeros(lm.n_layers, lm.d_model)
    models = {"original": lambda tokens: original_logits(lm, tokens)} | changed_models(lm, transcoder, mean)
    # zeros are both ablations here
    del models["mean_ablation"]
    found = measure_behaviour(lm, models, batches)
    original = found.pop("original").cross_entropy()
    found["mean_ablation"] = found["zero_ablation"]
    own = behaviour_summary(found, original)["replacement"]
    return {"agreement": own["agreement"], "kl": own["kl"], "ce_recovered": own["ce_recovered_zero"]}
