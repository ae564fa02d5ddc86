from collections.abc import Callable

import pytest
import torch
import transformers

from circuitmill.errors import ConfigError
from circuitmill.lm.hookpoints import FAMILIES, mlps, unembedding
from circuitmill.lm.load import LanguageModel


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_unembedding_gives_the_logits_up_to_the_norms_scale(
    lm_of: Callable[[str], LanguageModel], architecture: str
) -> None:
    lm = lm_of(architecture)
    norm = lm.model.get_submodule(FAMILIES[architecture].norm)
    head = lm.model.get_output_embeddings()
    x, y = torch.randn(2, 5, lm.d_model, generator=torch.Generator().manual_seed(1))
    folded = unembedding(lm.model)

    def scale(v: torch.Tensor) -> torch.Tensor:
        centred = v - v.mean(-1, keepdim=True) if FAMILIES[architecture].gain == "centred" else v
        return (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    # differences of two logit vectors, so that biases cancel
    theirs = head(norm(x)) - head(norm(y))
    ours = (x * scale(x) - y * scale(y)) @ folded.T
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_unknown_architecture_lists_the_known_ones() -> None:
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=10)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"gemma2.*llama.*found 'bloom'"):
        mlps(model)
