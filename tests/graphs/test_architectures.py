from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig, LlamaConfig, PreTrainedModel

from circuitmill.errors import ConfigError
from circuitmill.graphs.architectures import hooked_config
from circuitmill.graphs.tracer import LocalReplacementModel

ARCHITECTURES = (
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma2",
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replacement_model_has_the_logits_of_the_original(
    build: Callable[[str], LocalReplacementModel],
    make_model: Callable[[str], PreTrainedModel],
    prompt_ids: torch.Tensor,
    architecture: str,
) -> None:
    replaced, model = build(architecture), make_model(architecture)
    with torch.no_grad():
        wanted = model(prompt_ids[None]).logits
        found = replaced(prompt_ids)
    assert wanted.std() > 0.05  # a model that says the same everywhere would prove nothing
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt_neo", "qwen2-window", "mistral"])
def test_local_attention_stops_at_the_window(
    build: Callable[[str], LocalReplacementModel], prompt_ids: torch.Tensor, architecture: str
) -> None:
    replaced = build(architecture)
    _, cache = replaced.run_with_cache(prompt_ids)
    pattern = cache["blocks.0.attn.hook_pattern"][0]
    window = replaced.cfg.window_size
    assert len(prompt_ids) > window
    seen = torch.ones_like(pattern[0]).tril().triu(1 - window).bool()
    assert (pattern[:, ~seen] == 0).all()
    assert (pattern[:, seen] > 0).all()


def test_gpt_neo_with_scaled_attention_is_noticed(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[str], LocalReplacementModel]
) -> None:
    from circuitmill.graphs import tracer

    def scaled(config: object) -> tuple[dict, str]:
        fields, converter = hooked_config(config)
        return {**fields, "use_attn_scale": True}, converter

    monkeypatch.setattr(tracer, "hooked_config", scaled)
    with pytest.raises(ConfigError, match="logits equal to the original model's"):
        build("gpt_neo")


def test_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"gpt_neo.*found 'bert'"):
        hooked_config(BertConfig())


def test_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_type 'linear'"):
        hooked_config(LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}))
