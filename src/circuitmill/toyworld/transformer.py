"""The embedded language model: an ordinary Hugging Face decoder, small, with local attention where asked.

Local attention in the first layer and global attention above it make the model assemble a city's name, and
with it the state, at the name's last token, where a graph can show it.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from circuitmill.config.toyworld import TransformerConfig

_SINUSOID_SPAN = 200.0
"""Longest over shortest wavelength of the initial position embeddings."""
_EMBEDDING_STD = 0.02


def make_transformer(cfg: TransformerConfig, *, d_vocab: int, bos_id: int, seed: int) -> PreTrainedModel:
    """Build the model with random weights; a function of its arguments."""
    build = {"gpt_neo": _gpt_neo, "qwen2": _qwen2}[cfg.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(cfg, d_vocab, bos_id)


def _gpt_neo(cfg: TransformerConfig, d_vocab: int, bos_id: int) -> GPTNeoForCausalLM:
    kinds = {"L": "local", "G": "global"}
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=d_vocab,
            max_position_embeddings=cfg.context,
            hidden_size=cfg.d_model,
            num_layers=cfg.n_layers,
            num_heads=cfg.n_heads,
            intermediate_size=cfg.d_mlp,
            window_size=cfg.window,
            attention_types=[[[kinds[letter]], 1] for letter in cfg.attention],
            # The same function as gelu_new, which is what TransformerLens knows, but fused.
            activation_function="gelu_pytorch_tanh",
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=bos_id,
            eos_token_id=bos_id,
        )
    )
    scale = key_query_scale(cfg)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(_sinusoids(cfg.context, cfg.d_model) * _EMBEDDING_STD)
        for name, weight in model.named_parameters():
            if is_key_or_query(name):
                weight.mul_(scale)
    return model


def _qwen2(cfg: TransformerConfig, d_vocab: int, bos_id: int) -> Qwen2ForCausalLM:
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=d_vocab,
            max_position_embeddings=cfg.context,
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_heads,
            intermediate_size=cfg.d_mlp,
            use_sliding_window=True,
            sliding_window=cfg.window,
            layer_types=[kinds[letter] for letter in cfg.attention],
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=bos_id,
            eos_token_id=bos_id,
        )
    )


def _sinusoids(context: int, d_model: int) -> Tensor:
    frequency = torch.exp(-math.log(_SINUSOID_SPAN) * torch.arange(0, d_model, 2) / d_model)
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def is_key_or_query(name: str) -> bool:
    """Whether a parameter projects to keys or queries."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def key_query_scale(cfg: TransformerConfig) -> float:
    """What start and learning rate of keys and queries are multiplied by.

    GPT-Neo does not divide scores by sqrt(d_head); d_head^(-1/4) on both sides keeps them where a model that
    does would have them.
    """
    return (cfg.d_model // cfg.n_heads) ** -0.25 if cfg.architecture == "gpt_neo" else 1.0


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks in order; each has its MLP as `.mlp`."""
    return list(model.transformer.h if isinstance(model, GPTNeoForCausalLM) else model.model.layers)
