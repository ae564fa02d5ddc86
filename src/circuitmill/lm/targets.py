"""MLP outputs from MLP inputs, with the model's own MLPs: what a store of inputs alone leaves out.

An MLP sees one token at a time, so its stored inputs determine its outputs; attention, norms and embeddings
are not needed and not kept.
"""

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ShapeError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.lens import LensModel
from circuitmill.lm.load import LanguageModel, load_language_model

_HIDDEN_NUMBERS = 2**25
"""Numbers of an MLP's hidden layer held at once; a gated MLP holds three such tensors."""
_ACTIVATION_KEYS = ("activation_function", "hidden_act", "hidden_activation")
"""What the families call the activation in config.json."""


class MlpTargets:
    """MLP outputs of every layer from MLP inputs.

    `MlpTargets.of` shares its modules with a loaded model; `mlp_targets` leaves nothing else in memory. It is
    no nn.Module on purpose: its weights must never appear among the parameters of what is trained.
    """

    digest: str
    """SHA-256 over the MLPs' parameters, buffers, precision and activation. However files are cut, and on
    whatever device, the same weights have the same digest."""
    block_tokens: int
    """Tokens that go through an MLP together."""

    def __init__(self, modules: list[nn.Module], *, d_model: int, dtype: torch.dtype, name: str, digest: str) -> None:
        self._modules, self._d_model, self._dtype, self._name = modules, d_model, dtype, name
        self.digest = digest
        widest = max(max(tensor.shape) for module in modules for tensor in module.parameters() if tensor.ndim)
        self.block_tokens = max(_HIDDEN_NUMBERS // widest, 1)

    @classmethod
    def of(cls, lm: LanguageModel) -> "MlpTargets":
        """The targets of a loaded model, whose modules are shared, not copied.

        Raises:
            ConfigError: an architecture that is not in the table of hookpoints.
        """
        modules = mlps(lm.model)
        return cls(
            modules,
            d_model=lm.d_model,
            dtype=lm.model.dtype,
            name=lm.name,
            digest=_digest(_function(lm.model), modules),
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self._modules)

    def to(self, device: torch.device) -> "MlpTargets":
        """Move the weights, and return this object. Modules shared with a model move in that model too."""
        for module in self._modules:
            # HookedTransformer's parts have a `to` of their own that prints
            nn.Module.to(module, device)
        return self

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """What each layer's MLP makes of its inputs, in float32.

        The MLPs run in the model's precision, whatever autocast says, on blocks of tokens.

        Args:
            x: MLP inputs of all layers, first layer first, on the device of the weights.

        Raises:
            ShapeError: another number of layers or another width than the model's.
        """
        if x.shape[1:] != (self.n_layers, self._d_model):
            raise ShapeError(
                f"expected MLP inputs of {self.n_layers} layers and width {self._d_model}, as model {self._name} has",
                found=f"{x.shape[1]} layers, width {x.shape[2]}",
                where="MLP inputs, from which targets are recomputed",
                fix="use the model that the activations were cached from",
            )
        outputs = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for low in range(0, len(x), self.block_tokens):
                block = slice(low, low + self.block_tokens)
                for layer, module in enumerate(self._modules):
                    # a batch of one sequence: some MLPs take nothing else
                    inputs = x[block, layer].to(self._dtype).contiguous()[None]
                    outputs[block, layer] = module(inputs)[0]
        return outputs


def mlp_targets(cfg: ModelConfig, *, toyworld: Path | None, device: torch.device) -> MlpTargets:
    """Load a model and keep its MLPs only.

    Args:
        toyworld: Output folder of stage toyworld; needed for the embedded model only.

    Raises:
        ConfigError: the model cannot be loaded, or its architecture is unknown.
        StoreError: a weight file is damaged.
        UpstreamError: the embedded model is asked for without its stage's output.
    """
    targets = MlpTargets.of(load_language_model(cfg, toyworld=toyworld, device=device))
    # a model is full of reference cycles, which would hold the rest until some later collection
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return targets


def _function(model: PreTrainedModel | LensModel) -> dict[str, Any]:
    """What decides an MLP's function besides its tensors."""
    if isinstance(model, LensModel):
        return {"model_type": "transformer_lens", **model.mlp_settings}
    config = model.config
    keys = [key for key in _ACTIVATION_KEYS if hasattr(config, key)]
    return {"model_type": config.model_type, **{key: getattr(config, key) for key in keys}}


def _digest(function: dict[str, Any], modules: list[nn.Module]) -> str:
    digest = hashlib.sha256(json.dumps(function, sort_keys=True).encode())
    for layer, module in enumerate(modules):
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"\n{layer} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
