"""Shapes of language models against the models themselves, made without memory; and operations as torch counts them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from circuitmill.config.compose import load_run
from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError
from circuitmill.stages.cost_models import MODELS, ModelShape, described, embedded, model_shape, n_places, parse_shape
from circuitmill.toyworld.transformer import make_transformer

CONFIGS: dict[str, PretrainedConfig] = {
    "openai-community/gpt2": GPT2Config(),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
    ),
    "google/gemma-2-2b": Gemma2Config(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256_000,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
    ),
}
"""As on their hub pages, as far as sizes go."""
GIVEN = {
    "openai-community/gpt2": 124_439_808,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "google/gemma-2-2b": 2_614_341_888,
    "Qwen/Qwen3-0.6B": 596_049_920,
}
"""Parameters that the hub pages give, embeddings once where they are tied."""


def matrices(model: torch.nn.Module, mark: str) -> int:
    """Numbers in the matrices whose name has this."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and mark in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_known_models(name: str):
    shape, config = MODELS[name], CONFIGS[name]
    assert described(config.to_dict()) == shape
    with torch.device("meta"):
        config.tie_word_embeddings = True
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == GIVEN[name]
    blocks = "h." if name.endswith("gpt2") else "layers."
    assert matrices(model, blocks) == shape.n_layers * shape.block_numbers
    assert matrices(model, ".mlp.") == shape.n_layers * shape.mlp_numbers
    assert model.get_output_embeddings().weight.shape == (shape.d_vocab, shape.d_model)


@pytest.mark.parametrize("architecture", ["gpt_neo", "qwen2"])
def test_shape_of_the_embedded_model(architecture: Any):
    cfg = dataclasses.replace(load_run("demo").config("toyworld").transformer, architecture=architecture)
    model = make_transformer(cfg, d_vocab=300, bos_id=0, seed=0)
    shape = embedded(cfg)
    assert matrices(model, "h." if architecture == "gpt_neo" else "layers.") == shape.n_layers * shape.block_numbers
    assert (shape.n_layers, shape.d_model) == (cfg.n_layers, cfg.d_model)


SMALL = {
    "gpt2": GPT2Config(n_layer=2, n_embd=96, n_head=4, vocab_size=50),
    "qwen3": Qwen3Config(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=50,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_operations_of_a_forward_pass_are_those_that_torch_counts(name: str):
    shape, context = described(SMALL[name].to_dict()), 24
    assert shape is not None
    model = AutoModelForCausalLM.from_config(SMALL[name], attn_implementation="eager").eval()
    tokens = torch.zeros(3, context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    # of the products of queries, keys and values half is left out by the mask, which torch counts
    attention = shape.forward_flops(context) - shape.forward_flops(0)
    expected = shape.forward_flops(0, logits=True) + 2 * attention
    # rotary embeddings are a product too, of a few numbers
    found = counter.get_total_flops() / tokens.numel()
    assert found == pytest.approx(expected, rel=0 if name == "gpt2" else 1e-3) and attention > 0.01 * expected


def test_a_local_folder_says_its_shape(tiny_model_dir: Path):
    cfg = ModelConfig("folder", str(tiny_model_dir), "", "float32")
    shape = model_shape(cfg, None)
    assert shape == ModelShape(2, 16, 32, 16, 16, gated=False, d_vocab=300)
    assert model_shape(dataclasses.replace(cfg, name=str(tiny_model_dir / "gone")), None) is None


def test_a_folder_of_transformer_lens_says_its_shape(tmp_path: Path):
    settings = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 96, "d_vocab": 50, "gated_mlp": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    cfg = ModelConfig("transformer_lens", str(tmp_path), "", "float32")
    assert model_shape(cfg, None) == ModelShape(3, 32, 96, 32, 32, gated=True, d_vocab=50)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a model's config\.json"):
        model_shape(cfg, None)
    (tmp_path / "config.json").write_text("{}")
    assert model_shape(cfg, None) is None


def test_a_model_of_which_only_blocks_and_width_are_known():
    shape = parse_shape("12x768")
    assert shape.block_numbers == 12 * 768**2 == MODELS["openai-community/gpt2"].block_numbers
    for text in ("12", "12x", "x768", "0x768", "12x768x3", "-1x4"):
        with pytest.raises(ConfigError, match="two numbers as in 12x768"):
            parse_shape(text)


def test_places_of_two_models():
    cached = load_run("crosscoder-base-vs-chat").config("cache")
    assert n_places(cached, [MODELS["google/gemma-2-2b"]] * 2) == 2
    assert n_places(dataclasses.replace(cached, layers=None), [MODELS["google/gemma-2-2b"]] * 2) == 52
    with pytest.raises(ConfigError, match=r"two models of one d_model \(2304\)"):
        n_places(cached, [MODELS["google/gemma-2-2b"], MODELS["openai-community/gpt2"]])
