"""Shapes of language models, as far as costs need them, without loading one. No torch here.

They come from the configuration of the embedded model, from config.json of a local folder, or from a table of the
models that shipped experiments name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill.config.activations import ActivationsConfig
from circuitmill.config.model import ModelConfig
from circuitmill.config.toyworld import TransformerConfig
from circuitmill.errors import ConfigError
from circuitmill.pipeline import OPTIONAL_UPSTREAM

_UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "phi")
"""Families, as config.json names them, whose MLPs are two matrices; those of the others that we know are three."""


@dataclass(frozen=True)
class ModelShape:
    """Of a transformer with one MLP per block."""

    n_layers: int
    """Blocks."""
    d_model: int
    d_mlp: int
    d_query: int
    """Heads times the size of a head."""
    d_key: int
    """The same of keys and values, which heads may share."""
    gated: bool
    """Whether an MLP has a third matrix."""
    d_vocab: int
    """0 if it is not known."""

    @classmethod
    def like(cls, n_layers: int, d_model: int) -> "ModelShape":
        """With blocks of 12 d_model^2 numbers: as many heads for keys as for queries, MLPs four times as wide."""
        return cls(n_layers, d_model, 4 * d_model, d_model, d_model, gated=False, d_vocab=0)

    @property
    def mlp_numbers(self) -> int:
        """Numbers in the matrices of one MLP."""
        return (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def block_numbers(self) -> int:
        """Numbers in the matrices of one block."""
        return 2 * self.d_model * (self.d_query + self.d_key) + self.mlp_numbers

    def forward_flops(self, context: int, *, logits: bool = False) -> float:
        """Operations of a forward pass for a token: 2 N + 2 n_layers context d_query.

        N are the numbers in the matrices of all blocks, with the unembedding if logits are computed; the second term
        is attention (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1).
        """
        numbers = self.n_layers * self.block_numbers + (self.d_model * self.d_vocab if logits else 0)
        return 2.0 * numbers + 2.0 * self.n_layers * context * self.d_query


MODELS = {
    "openai-community/gpt2": ModelShape(12, 768, 3072, 768, 768, gated=False, d_vocab=50_257),
    "meta-llama/Llama-3.2-1B": ModelShape(16, 2048, 8192, 32 * 64, 8 * 64, gated=True, d_vocab=128_256),
    "google/gemma-2-2b": ModelShape(26, 2304, 9216, 8 * 256, 4 * 256, gated=True, d_vocab=256_000),
    "google/gemma-2-2b-it": ModelShape(26, 2304, 9216, 8 * 256, 4 * 256, gated=True, d_vocab=256_000),
    "Qwen/Qwen3-0.6B": ModelShape(28, 1024, 3072, 16 * 128, 8 * 128, gated=True, d_vocab=151_936),
}
"""The models that shipped experiments name, by config.json on their hub pages."""


def embedded(cfg: TransformerConfig) -> ModelShape:
    """Of the embedded model, whose vocabulary follows from its corpus."""
    gated = cfg.architecture == "qwen2"
    return ModelShape(cfg.n_layers, cfg.d_model, cfg.d_mlp, cfg.d_model, cfg.d_model, gated=gated, d_vocab=0)


def described(data: Mapping[str, Any]) -> ModelShape | None:
    """By a config.json of Hugging Face or of TransformerLens; None if it lacks something."""
    data = data.get("text_config", data)

    def first(*keys: str) -> Any:
        return next((data[key] for key in keys if data.get(key) is not None), None)

    layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    width, heads = (
        first("hidden_size", "n_embd", "d_model"),
        first("num_attention_heads", "n_head", "num_heads", "n_heads"),
    )
    if not (layers and width and heads):
        return None
    own = first("head_dim", "d_head") or width // heads
    keys = first("num_key_value_heads", "n_key_value_heads") or heads
    gated = data["gated_mlp"] if "gated_mlp" in data else data.get("model_type") not in _UNGATED
    mlp = first("intermediate_size", "n_inner", "d_mlp") or 4 * width
    vocabulary = first("vocab_size", "d_vocab") or 0
    return ModelShape(layers, width, mlp, heads * own, keys * own, gated=bool(gated), d_vocab=vocabulary)


def model_shape(cfg: ModelConfig, transformer: TransformerConfig | None) -> ModelShape | None:
    """Of the model that a configuration names; None if it is a hub model that the table does not have.

    Args:
        cfg: Of the model.
        transformer: The embedded model's, in a run that has it.
    """
    if cfg.source == OPTIONAL_UPSTREAM:
        return None if transformer is None else embedded(transformer)
    if cfg.source == "huggingface":
        return MODELS.get(cfg.name)
    path = Path(cfg.name) / "config.json"
    if not path.is_file():
        return None
    try:
        return described(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            "a model's config.json", found=error, where=path, fix="write the model's folder again"
        ) from error


def n_places(cached: ActivationsConfig, models: Sequence[ModelShape]) -> int:
    """Places at which activations are taken: the chosen blocks of every model, as `lm.sites.Sites` counts them.

    Raises:
        ConfigError: a block that a model does not have, or models of different widths.
    """
    layers = cached.layers
    for each in models:
        if each.d_model != models[0].d_model:
            raise ConfigError(
                f"two models of one d_model ({models[0].d_model})",
                found=each.d_model,
                where="cache.second_model",
                fix="choose a second model of the same width",
            )
        if layers is not None and layers[-1] >= each.n_layers:
            raise ConfigError(
                f"layers from 0 to {each.n_layers - 1}", found=layers[-1], where="cache.layers", fix="leave it out"
            )
    return sum(each.n_layers if layers is None else len(layers) for each in models)


def parse_shape(text: str) -> ModelShape:
    """Blocks and width, as 12x768.

    Raises:
        ConfigError: something else.
    """
    layers, _, width = text.partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise ConfigError(
            "two numbers as in 12x768", found=text, where="--shape", fix="give blocks and width of the language model"
        )
    return ModelShape.like(int(layers), int(width))
