"""Random models of every architecture and random transcoders for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from circuitmill.core.transcoder import Transcoder
from circuitmill.graphs.graph import AttributionGraph
from circuitmill.graphs.tracer import LocalReplacementModel, replacement_model, trace
from circuitmill.stores.clt import save_clt

D_MODEL, CONTEXT, N_FEATURES, D_VOCAB = 16, 32, 24, 300


def tiny_model(architecture: str, n_layers: int = 3) -> PreTrainedModel:
    """A random model whose weights are large enough that every layer matters."""
    import transformers

    vocabulary = {"vocab_size": D_VOCAB, "bos_token_id": 1, "eos_token_id": 1}
    shape = {"hidden_size": D_MODEL, "num_hidden_layers": n_layers, "num_attention_heads": 2}
    gated = {**shape, "intermediate_size": 40, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
    mixed = ["sliding_attention"] + ["full_attention"] * (n_layers - 1)
    kinds = {
        "gpt2": ("GPT2", {"n_embd": D_MODEL, "n_layer": n_layers, "n_head": 2, "n_positions": CONTEXT}),
        "gpt_neo": (
            "GPTNeo",
            {
                "hidden_size": D_MODEL,
                "num_layers": n_layers,
                "num_heads": 2,
                "intermediate_size": 24,
                "window_size": 4,
                "attention_types": [[["local"], 1], [["global"], n_layers - 1]],
                "max_position_embeddings": CONTEXT,
            },
        ),
        "gpt_neox": ("GPTNeoX", {**shape, "intermediate_size": 40, "rotary_pct": 0.5}),
        "llama": ("Llama", gated),
        "llama3-rope": (
            "Llama",
            {
                **gated,
                "num_key_value_heads": 2,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        "mistral": ("Mistral", {**gated, "sliding_window": 5}),
        "qwen2": ("Qwen2", gated),
        "qwen2-window": (
            "Qwen2",
            {**gated, "use_sliding_window": True, "sliding_window": 4, "layer_types": mixed},
        ),
        "qwen3": ("Qwen3", {**gated, "head_dim": 12}),
        "gemma2": ("Gemma2", {**gated, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 9}),
    }
    family, options = kinds[architecture]
    config = getattr(transformers, f"{family}Config")(**vocabulary, **options)
    config._attn_implementation = "eager"
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def random_transcoder(
    n_layers: int = 3, n_features: int = N_FEATURES, d_model: int = D_MODEL, threshold: float = 0.3
) -> Transcoder:
    generator = torch.Generator().manual_seed(1)
    transcoder = Transcoder(n_layers, n_features, d_model)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        transcoder.b_enc.sub_(1.0)
        transcoder.log_threshold.fill_(threshold).log_()
    return transcoder


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], PreTrainedModel]:
    """A random model of an architecture, three layers."""
    return tiny_model


@pytest.fixture(scope="session")
def make_transcoder() -> Callable[..., Transcoder]:
    """A random transcoder for it."""
    return random_transcoder


@pytest.fixture(scope="session")
def transcoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random transcoder for three layers."""
    folder = tmp_path_factory.mktemp("transcoder")
    save_clt(folder, random_transcoder(), scan="./data/features", model_name="tiny")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    """Bytes as tokens, BOS id 1."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def prompt_ids() -> torch.Tensor:
    """Longer than every attention window."""
    return torch.tensor([1, 70, 71, 200, 70, 34, 99, 120, 71, 5, 44])


@pytest.fixture(scope="session")
def build(
    transcoder_dir: Path, tokenizer: PreTrainedTokenizerBase, prompt_ids: torch.Tensor
) -> Callable[[str], LocalReplacementModel]:
    """A replacement model of an architecture, around the random transcoder."""

    def make(architecture: str, folder: Path = transcoder_dir) -> LocalReplacementModel:
        return replacement_model(tiny_model(architecture), tokenizer, folder, prompt_ids)

    return make


def trace_all(replaced: LocalReplacementModel, ids: torch.Tensor, max_feature_nodes: int = 10_000) -> AttributionGraph:
    return trace(replaced, ids, prompt="text", max_logits=5, logit_mass=0.9, max_feature_nodes=max_feature_nodes)


@pytest.fixture(scope="session")
def trace_ids() -> Callable[..., AttributionGraph]:
    """The graph of token ids, with all active features unless told otherwise."""
    return trace_all


@pytest.fixture(scope="session")
def neo(build: Callable[[str], LocalReplacementModel]) -> LocalReplacementModel:
    """The replacement model of a random GPT-Neo with a local first layer."""
    return build("gpt_neo")


@pytest.fixture(scope="session")
def neo_graph(neo: LocalReplacementModel, prompt_ids: torch.Tensor) -> AttributionGraph:
    """Its graph, with all active features."""
    return trace_all(neo, prompt_ids)
