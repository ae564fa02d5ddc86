"""Models that only TransformerLens has: saved, loaded and captured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, StoreError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import mlps, unembedding
from circuitmill.lm.lens import LensModel, save_lens_model
from circuitmill.lm.load import LanguageModel, context_of, load_config, load_language_model
from circuitmill.lm.measure import measure_fit
from circuitmill.lm.replacement import ablated_logits, original_logits
from circuitmill.lm.targets import MlpTargets, mlp_targets

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
SHAPE = {"n_layers": 3, "d_model": 16, "n_ctx": 32, "d_head": 8, "n_heads": 2, "d_mlp": 24, "d_vocab": 300}
KINDS: dict[str, dict[str, Any]] = {
    "solu": {"act_fn": "solu_ln", "normalization_type": "LN", "seed": 3, "tokenizer_name": None},
    "solu-folded": {"act_fn": "solu_ln", "normalization_type": "LNPre", "positional_embedding_type": "shortformer"},
    "no-norm": {"act_fn": "relu", "normalization_type": None},
    "gated": {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "n_key_value_heads": 1,
        "positional_embedding_type": "rotary",
        "use_normalization_before_and_after": True,
    },
    "parallel": {"act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True},
    "experts": {"act_fn": "silu", "normalization_type": "RMS", "num_experts": 4, "experts_per_token": 2},
}


def hooked_of(kind: str) -> HookedTransformer:
    hooked = HookedTransformer(HookedTransformerConfig(**SHAPE, **KINDS[kind], device="cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hooked.eval()


def config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(source="transformer_lens", name=str(folder), revision="", dtype=dtype)


def load(folder: Path, dtype: str = "float32") -> LanguageModel:
    return load_language_model(config(folder, dtype), toyworld=None, device=CPU)


@pytest.fixture
def saved(tmp_path: Path, tiny_model_dir: Path) -> Callable[[str], tuple[HookedTransformer, Path]]:
    def make(kind: str = "solu") -> tuple[HookedTransformer, Path]:
        hooked, folder = hooked_of(kind), tmp_path / kind
        save_lens_model(hooked, AutoTokenizer.from_pretrained(tiny_model_dir), folder)
        return hooked, folder

    return make


Saved = Callable[..., tuple[HookedTransformer, Path]]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_captured_as_transformer_lens_sees_it(saved: Saved, kind: str) -> None:
    hooked, folder = saved(kind)
    lm = load(folder)
    assert (lm.n_layers, lm.d_model, lm.d_vocab, lm.context, lm.bos_id) == (3, 16, 300, 32, 1)
    inputs, outputs = capture_mlp(lm, TOKENS)
    assert inputs.shape == outputs.shape == (3, 11, 3, 16)
    _, cache = hooked.run_with_cache(TOKENS)
    for layer, block in enumerate(hooked.blocks):
        residual = cache["resid_pre" if kind == "parallel" else "resid_mid", layer]
        torch.testing.assert_close(inputs[:, :, layer], block.ln2(residual), atol=1e-6, rtol=0)
        after = getattr(block, "ln2_post", lambda x: x)
        torch.testing.assert_close(after(outputs[:, :, layer]), cache["mlp_out", layer], atol=1e-6, rtol=0)
    assert outputs.std() > 0.01


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_else_works(saved: Saved, kind: str) -> None:
    hooked, folder = saved(kind)
    lm = load(folder)
    logits = hooked(TOKENS).detach()
    torch.testing.assert_close(original_logits(lm, TOKENS), logits, atol=1e-6, rtol=1e-5)
    inputs, outputs = (captured.flatten(0, 1) for captured in capture_mlp(lm, TOKENS))
    targets = mlp_targets(config(folder), toyworld=None, device=CPU)
    torch.testing.assert_close(targets(inputs), outputs, atol=1e-6, rtol=1e-5)
    assert targets.digest == MlpTargets.of(lm).digest
    changed = ablated_logits(lm, torch.zeros(3, 16), TOKENS)
    assert (changed - logits).abs().max() > 1e-3
    fit = measure_fit(lm, Transcoder(3, 5, 16), [TOKENS])
    assert fit.firing.n_tokens == TOKENS.numel()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_unembedding_gives_the_logits_up_to_the_norms_scale(saved: Saved, kind: str) -> None:
    hooked, folder = saved(kind)
    norm = hooked.ln_final if hasattr(hooked, "ln_final") else lambda x: x
    x, y = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(1))
    centred = (KINDS[kind]["normalization_type"] or "").startswith("LN")

    def scaled(v: torch.Tensor) -> torch.Tensor:
        if KINDS[kind]["normalization_type"] is None:
            return v
        v_centred = v - v.mean(-1, keepdim=True) if centred else v
        return v / (v_centred.square().mean(-1, keepdim=True) + hooked.cfg.eps).sqrt()

    # differences of two logit vectors, so that biases cancel
    theirs = hooked.unembed(norm(x)) - hooked.unembed(norm(y))
    ours = (scaled(x) - scaled(y)) @ unembedding(load(folder).model).T
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-4)


def test_no_logits_and_no_hooks_left(saved: Saved) -> None:
    lm = load(saved()[1])
    assert isinstance(lm.model, LensModel)
    ran: list[str] = []
    lm.model.hooked.blocks[2].hook_mlp_out.add_hook(lambda x, hook: ran.append(hook.name))
    lm.model.hooked.ln_final.register_forward_hook(lambda *_: ran.append("norm"))
    lm.model.hooked.unembed.register_forward_hook(lambda *_: ran.append("unembedding"))
    capture_mlp(lm, TOKENS)
    lm.model.base_model(input_ids=TOKENS)
    assert ran == ["blocks.2.hook_mlp_out"]  # from the second pass, which no exception ends
    assert all(not module._forward_hooks for module in mlps(lm.model))
    assert not lm.model.training and not any(parameter.requires_grad for parameter in lm.model.parameters())
    with pytest.raises(ConfigError, match="use_cache"):
        lm.model(TOKENS, use_cache=True)


def test_bfloat16(saved: Saved) -> None:
    folder = saved("gated")[1]
    lm, whole = load(folder, "bfloat16"), load(folder)
    assert lm.model.dtype == torch.bfloat16 and {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    inputs, outputs = (captured.flatten(0, 1) for captured in capture_mlp(lm, TOKENS))
    assert inputs.dtype == torch.bfloat16
    torch.testing.assert_close(MlpTargets.of(lm)(inputs.float()), outputs.float(), atol=2**-8, rtol=2**-7)
    torch.testing.assert_close(outputs.float(), capture_mlp(whole, TOKENS)[1].flatten(0, 1), atol=0.1, rtol=0.1)


def test_no_pickle_no_reseeding_no_tokenizer_by_name(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = saved()
    settings = json.loads((folder / "config.json").read_text())
    assert not {"device", "dtype", "seed", "tokenizer_name"} & settings.keys()
    # as a HookedTransformerConfig written by hand may have them
    settings |= {"seed": 5, "tokenizer_name": "nobody/nothing", "device": "cuda", "dtype": "torch.float16"}
    (folder / "config.json").write_text(json.dumps(settings))

    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", forbidden)
    state = torch.random.get_rng_state()
    capture_mlp(load(folder), TOKENS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert capsys.readouterr().out == ""
    (folder / "model.safetensors").rename(folder / "model.pth")
    with pytest.raises(ConfigError, match=r"model\.safetensors(.|\n)*save_lens_model"):
        load(folder)


def test_a_whole_state_dict_is_taken_too(saved: Saved) -> None:
    hooked, folder = saved("gated")
    digest = load(folder).digest
    save_file({name: tensor.contiguous() for name, tensor in hooked.state_dict().items()}, folder / "model.safetensors")
    lm = load(folder)
    assert lm.digest != digest
    torch.testing.assert_close(original_logits(lm, TOKENS), hooked(TOKENS).detach(), atol=1e-6, rtol=1e-5)


def test_damaged_and_foreign_weights(saved: Saved) -> None:
    folder = saved()[1]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match="a whole safetensors file"):
        load(folder)
    del tensors["blocks.1.mlp.W_in"]
    save_file(tensors, path)
    with pytest.raises(StoreError, match=r"blocks.1.mlp.W_in of shape \(16, 24\)(.|\n)*found shape none"):
        load(folder)
    save_file({**tensors, "blocks.1.mlp.W_in": torch.zeros(16, 23)}, path)
    with pytest.raises(StoreError, match=r"found shape \(16, 23\), and 0 more"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_only": True}, "a model with MLPs"),
        ({"load_in_4bit": True}, "not quantised"),
        ({"n_ctx": None}, "n_ctx: None"),
        ({"model_type": "gpt2"}, r"settings that make a HookedTransformer(.|\n)*model_type"),
        ({"act_fn": "swish7"}, "swish7"),
    ],
)
def test_settings_that_make_no_model(saved: Saved, change: dict, message: str) -> None:
    folder = saved()[1]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_folder_without_settings(saved: Saved, tmp_path: Path) -> None:
    folder = saved()[1]
    for text in ("[1]", "{"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="HookedTransformerConfig as a JSON object"):
            load(folder)
    with pytest.raises(ConfigError, match="save_lens_model"):
        load(tmp_path / "nowhere")


def test_context_without_loading_weights(saved: Saved) -> None:
    assert context_of(load_config(config(saved()[1]), toyworld=None)) == 32


def test_tracing_needs_a_hugging_face_model(saved: Saved) -> None:
    lm = load(saved()[1])
    with pytest.raises(ConfigError, match=r"can be traced; found model.source transformer_lens(.|\n)*stage attribute"):
        _ = lm.pretrained
