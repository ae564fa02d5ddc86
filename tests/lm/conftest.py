"""Random tiny checkpoints of every architecture in the table, with a byte-level tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from circuitmill.config.model import ModelConfig
from circuitmill.lm.load import LanguageModel, load_language_model

_SHARED = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1}
_ROTARY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_LOCAL = "sliding_attention"
_GEMMA = {**_ROTARY, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "window_size": 4,
            "attention_types": [[["local"], 1], [["global"], 2]],
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_ROTARY, "use_parallel_residual": True}),
    "gptj": ("GPTJConfig", {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "rotary_dim": 4}),
    "phi": ("PhiConfig", {**_ROTARY, "num_key_value_heads": 2}),
    "llama": ("LlamaConfig", _ROTARY),
    "mistral": ("MistralConfig", {**_ROTARY, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", _ROTARY),
    "qwen3": ("Qwen3Config", {**_ROTARY, "head_dim": 8}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 0.1},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {**_GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 9, "layer_types": [_LOCAL, "full_attention", _LOCAL]},
    ),
}


def random_model(architecture: str) -> PreTrainedModel:
    """A model whose norms have gains and biases that a mistake would show."""
    name, fields = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**{**_SHARED, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def lm_of(tmp_path: Path, tiny_model_dir: Path) -> Callable[[str], LanguageModel]:
    """Save a random model of an architecture and load it as the stages do."""

    def make(architecture: str) -> LanguageModel:
        folder = tmp_path / architecture
        random_model(architecture).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
        cfg = ModelConfig(source="folder", name=str(folder), revision="", dtype="float32")
        return load_language_model(cfg, toyworld=None, device=torch.device("cpu"))

    return make
