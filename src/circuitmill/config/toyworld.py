"""Options of stage `toyworld`: the corpus, the tokenizer and the transformer of the embedded model."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError


def _require(condition: bool, expected: str, found: object, key: str) -> None:
    if not condition:
        raise ConfigError(expected, found=found, where=f"toyworld.{key}", fix="correct the value")


@dataclass(frozen=True)
class CorpusConfig:
    """The generated text."""

    documents: int
    """Documents, about 15 tokens each; the language model is trained on all of them."""
    heldout_share: float
    """Share of distinct documents that is kept from transcoders: a file of its own, split by hash of the text."""
    mix: dict[str, float]
    """Family of documents -> share; relative."""

    def __post_init__(self) -> None:
        _require(self.documents > 0, "a positive number", self.documents, "corpus.documents")
        _require(0 < self.heldout_share < 1, "a share between 0 and 1", self.heldout_share, "corpus.heldout_share")
        shares = list(self.mix.values())
        _require(
            bool(shares) and min(shares) >= 0 and sum(shares) > 0,
            "shares of at least 0",
            self.mix,
            "corpus.mix",
        )


@dataclass(frozen=True)
class TransformerConfig:
    """The language model's shape."""

    architecture: Literal["gpt_neo", "qwen2"]
    """Family of the Hugging Face model."""
    n_layers: int
    """Blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads per block."""
    d_mlp: int
    """Width of the MLPs."""
    context: int
    """Positions."""
    attention: str
    """One letter per block: L looks back `window` tokens, G at everything."""
    window: int
    """Tokens that a local block sees, its own included."""

    def __post_init__(self) -> None:
        for key in ("n_layers", "d_model", "n_heads", "d_mlp", "context", "window"):
            _require(getattr(self, key) > 0, "a positive number", getattr(self, key), f"transformer.{key}")
        _require(
            self.d_model % (2 * self.n_heads) == 0,
            f"a multiple of twice n_heads ({2 * self.n_heads})",
            self.d_model,
            "transformer.d_model",
        )
        _require(
            len(self.attention) == self.n_layers and set(self.attention) <= set("LG"),
            f"{self.n_layers} letters L or G",
            self.attention,
            "transformer.attention",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """How the language model is trained. Budgets are in tokens."""

    tokens: int
    """Tokens to train on, in all."""
    batch_tokens: int
    """Tokens per update; a multiple of the context."""
    warmup_tokens: int
    """Tokens over which the learning rates rise from zero."""
    decay_from: float
    """Share of the budget after which the learning rates fall linearly."""
    final_lr: float
    """Share of the learning rates that is left at the end."""
    lr_attention: float
    """Muon's learning rate for the matrices of attention."""
    lr_mlp: float
    """Muon's learning rate for the matrices of the MLPs."""
    lr_rest: float
    """AdamW's learning rate, for embeddings, biases and norms."""
    weight_decay: float
    """Decay of the matrices."""
    clip: float
    """Largest norm of the gradient."""
    checkpoint_tokens: int
    """Tokens between two checkpoints."""
    extensions: int
    """How many times pretraining may go on because a figure is below `accept`; 0 fails at once."""
    extension_tokens: int
    """Tokens per extension."""
    extension_rate: float
    """Share of the learning rates that an extension rises to; they fall linearly from there to `final_lr`."""

    def __post_init__(self) -> None:
        positive = ("tokens", "batch_tokens", "lr_attention", "lr_mlp", "lr_rest", "clip", "checkpoint_tokens")
        for key in positive:
            _require(getattr(self, key) > 0, "a positive number", getattr(self, key), f"pretrain.{key}")
        for key in ("decay_from", "final_lr", "extension_rate"):
            _require(0 <= getattr(self, key) <= 1, "a share from 0 to 1", getattr(self, key), f"pretrain.{key}")
        for key in ("warmup_tokens", "weight_decay", "extensions"):
            _require(getattr(self, key) >= 0, "a number of at least 0", getattr(self, key), f"pretrain.{key}")
        for key in ("tokens", "extension_tokens"):
            _require(
                getattr(self, key) >= self.batch_tokens,
                f"at least one batch ({self.batch_tokens} tokens)",
                getattr(self, key),
                f"pretrain.{key}",
            )


@dataclass(frozen=True)
class ToyworldConfig:
    """Stage `toyworld`."""

    seed: int
    """Decides the held-out sets, the text, the first weights and the order of the batches."""
    corpus: CorpusConfig
    """The generated text."""
    transformer: TransformerConfig
    """The language model's shape."""
    pretrain: PretrainConfig
    """How the language model is trained."""
    accept: dict[str, float]
    """Measured figure -> what it must reach; pretraining goes on otherwise, and the stage fails if that does not help.
    Empty asks for nothing."""

    def __post_init__(self) -> None:
        context = self.transformer.context
        _require(
            self.pretrain.batch_tokens % context == 0,
            f"a multiple of the context ({context})",
            self.pretrain.batch_tokens,
            "pretrain.batch_tokens",
        )
