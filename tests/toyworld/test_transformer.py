import math

import pytest
import torch
from tests.toyworld.conftest import replace
from transformers import AutoModelForCausalLM

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.toyworld.transformer import blocks, key_query_scale, make_transformer

ARCHITECTURES = ["gpt_neo", "qwen2"]


def make(cfg: ToyworldConfig, architecture: str, seed: int = 0):
    cfg = replace(cfg, transformer={"architecture": architecture})
    return make_transformer(cfg.transformer, d_vocab=300, bos_id=256, seed=seed).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_block_sees_its_window_and_a_global_one_everything(architecture: str, tiny_cfg: ToyworldConfig):
    model = make(tiny_cfg, architecture)
    tokens = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 300
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in blocks(model):
        block.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens, use_cache=False)
        model(changed, use_cache=False)
    for layer, reach in ((0, 2 + tiny_cfg.transformer.window), (1, 12)):
        same = (outputs[layer] == outputs[layer + 2])[0].all(-1).tolist()
        assert same == [pos < 2 or pos >= reach for pos in range(12)], layer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(
    architecture: str, tiny_cfg: ToyworldConfig
):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two, other = (make(tiny_cfg, architecture, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_an_ordinary_hugging_face_folder(architecture: str, tiny_cfg: ToyworldConfig, tmp_path):
    model = make(tiny_cfg, architecture)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert all(hasattr(block, "mlp") for block in blocks(loaded))


def test_keys_and_queries_of_gpt_neo_start_smaller(tiny_cfg: ToyworldConfig):
    cfg = tiny_cfg.transformer
    scale = key_query_scale(cfg)
    assert scale**4 == pytest.approx(cfg.n_heads / cfg.d_model)
    model = make(tiny_cfg, "gpt_neo")
    attention = model.transformer.h[0].attn.attention
    ratio = attention.q_proj.weight.std() / attention.v_proj.weight.std()
    assert ratio.item() == pytest.approx(scale, rel=0.1)


def test_positions_start_as_sinusoids(tiny_cfg: ToyworldConfig):
    weight = make(tiny_cfg, "gpt_neo").transformer.wpe.weight / 0.02
    assert weight[3, 0].item() == pytest.approx(math.sin(3), abs=1e-5)
    assert weight[3, 1].item() == pytest.approx(math.cos(3), abs=1e-5)
