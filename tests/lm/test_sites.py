"""Hookpoints against TransformerLens, against each other, and of two models together."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.lm.conftest import ARCHITECTURES
from tests.lm.streaming import model_config
from tests.lm.test_lens import KINDS, hooked_of
from tests.lm.test_lens import config as lens_config
from tests.lm.test_transformer_lens import hooked_of as converted
from torch import Tensor
from transformers import AutoTokenizer

from circuitmill.config.activations import Single
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import FAMILIES, sites
from circuitmill.lm.lens import save_lens_model
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.sites import Sites, activations_of, capture_sites, load_sites, mlp_sites

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
KEEP = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1)) < 0.7
PARALLEL = ("gpt_neox", "gptj", "phi")
RESIDUAL: tuple[Single, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out")
Maker = Callable[[str], LanguageModel]


def all_layers(lm: LanguageModel, hookpoint: Single) -> Tensor:
    return capture_sites(lm, TOKENS, hookpoint, range(lm.n_layers))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama", "qwen3", "gemma2", "gemma3_text", *PARALLEL])
def test_equal_to_transformer_lens(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    with torch.no_grad():
        _, cache = converted(lm, architecture).run_with_cache(TOKENS)
    for hookpoint in RESIDUAL:
        if hookpoint == "resid_mid" and architecture in PARALLEL:
            continue
        found = all_layers(lm, hookpoint)
        assert found.shape == (3, 11, lm.n_layers, lm.d_model)
        for layer in range(lm.n_layers):
            expected = cache[f"blocks.{layer}.hook_{hookpoint}"]
            assert expected.std() > 0.01
            torch.testing.assert_close(found[:, :, layer], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_places_add_up(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    pre, post, attention = (all_layers(lm, name) for name in ("resid_pre", "resid_post", "attn_out"))
    written = all_layers(lm, "mlp_out")
    assert torch.equal(post[:, :, :-1], pre[:, :, 1:])
    for part in (pre, post, attention, written):
        assert part.std() > 0.01
    if architecture.startswith(("gemma2", "gemma3")):
        # a norm stands behind the MLP
        blocks = lm.pretrained.get_submodule(FAMILIES[architecture].blocks)
        norms = [block.post_feedforward_layernorm for block in blocks]
        written = torch.stack([norm(written[:, :, layer]) for layer, norm in enumerate(norms)], dim=2)
    torch.testing.assert_close(post, pre + attention + written, atol=1e-5, rtol=0)
    if architecture not in PARALLEL:
        middle = all_layers(lm, "resid_mid")
        torch.testing.assert_close(middle, pre + attention, atol=1e-6, rtol=0)
        torch.testing.assert_close(post, middle + written, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", PARALLEL)
def test_parallel_blocks_have_no_middle(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    for ask in (lambda: all_layers(lm, "resid_mid"), lambda: activations_of(choice(hookpoint="resid_mid"), [lm])):
        with pytest.raises(ConfigError, match=rf"found resid_mid.*{architecture}\n(.|\n)*use resid_pre, resid_post"):
            ask()


def test_sequential_blocks_of_gpt_neox_have_one(lm_of: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fields = ARCHITECTURES["gpt_neox"]
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", (name, {**fields, "use_parallel_residual": False}))
    lm = lm_of("gpt_neox")
    middle = all_layers(lm, "resid_mid")
    torch.testing.assert_close(middle, all_layers(lm, "resid_pre") + all_layers(lm, "attn_out"), atol=1e-6, rtol=0)
    torch.testing.assert_close(all_layers(lm, "resid_post"), middle + all_layers(lm, "mlp_out"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_models_of_transformer_lens(kind: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    hooked = hooked_of(kind)
    save_lens_model(hooked, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path)
    lm = load_language_model(lens_config(tmp_path), toyworld=None, device=CPU)
    with torch.no_grad():
        _, cache = hooked.run_with_cache(TOKENS)
    for hookpoint in RESIDUAL:
        if hookpoint == "resid_mid" and kind == "parallel":
            with pytest.raises(ConfigError, match="found resid_mid, for a model of type parallel_attn_mlp"):
                all_layers(lm, hookpoint)
            continue
        expected = torch.stack([cache[hookpoint, layer] for layer in range(3)], dim=2)
        torch.testing.assert_close(all_layers(lm, hookpoint), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(all_layers(lm, "mlp_in"), capture_mlp(lm, TOKENS)[0], atol=0, rtol=0)


def test_ends_of_the_mlp_are_those_of_the_pair(lm_of: Maker) -> None:
    lm = lm_of("gemma2")
    for hookpoint, expected in zip(("mlp_in", "mlp_out"), capture_mlp(lm, TOKENS), strict=True):
        assert torch.equal(all_layers(lm, hookpoint), expected)
    inputs, outputs = mlp_sites(lm)(TOKENS, KEEP)
    for found, expected in zip((inputs, outputs), capture_mlp(lm, TOKENS), strict=True):
        assert torch.equal(found, expected[KEEP])


@pytest.mark.parametrize("hookpoint", ["mlp_in", "mlp_out", *RESIDUAL])
def test_some_layers_and_some_positions(lm_of: Maker, hookpoint: Single) -> None:
    lm = lm_of("qwen3")
    whole = all_layers(lm, hookpoint)
    assert torch.equal(capture_sites(lm, TOKENS, hookpoint, (0, 2)), whole[:, :, [0, 2]])
    kept = capture_sites(lm, TOKENS, hookpoint, (1,), KEEP)
    assert torch.equal(kept, whole[KEEP][:, [1]])


@pytest.mark.parametrize(
    ("hookpoint", "ran"),
    [
        ("resid_pre", []),
        ("attn_out", ["self_attn"]),
        ("resid_mid", ["self_attn"]),
        ("mlp_in", ["self_attn"]),
        ("mlp_out", ["self_attn", "mlp"]),
        ("resid_post", ["self_attn", "mlp"]),
    ],
)
def test_the_pass_ends_with_the_last_place(lm_of: Maker, hookpoint: Single, ran: list[str]) -> None:
    lm = lm_of("llama")
    found: list[str] = []
    blocks = lm.model.model.layers
    for number in (1, 2):
        for name in ("self_attn", "mlp"):
            blocks[number].get_submodule(name).register_forward_hook(
                lambda *_, name=name, number=number: found.append(f"{name}.{number}")
            )
    capture_sites(lm, TOKENS, hookpoint, (0, 1))
    assert found == [f"{name}.1" for name in ran]
    first = sites(lm.model, hookpoint)[0].module
    assert not first._forward_hooks and not first._forward_pre_hooks


def test_hooks_are_removed_when_the_model_fails(lm_of: Maker) -> None:
    lm = lm_of("gpt2")
    with pytest.raises(IndexError):
        capture_sites(lm, torch.full((1, 4), 10_000), "resid_post", (0, 1))
    assert all(not site.module._forward_hooks for site in sites(lm.model, "resid_post"))


def test_longer_than_the_context(lm_of: Maker) -> None:
    with pytest.raises(ConfigError, match=r"at most 32 tokens.*found 33(.|\n)*tokenize.context"):
        capture_sites(lm_of("gpt_neo"), torch.ones(1, 33, dtype=torch.long), "resid_pre", (0,))


def test_another_width_is_refused(lm_of: Maker) -> None:
    lm = lm_of("gpt2")
    sites(lm.model, "attn_out")[1].module.register_forward_hook(lambda _m, _a, output: (output[0][..., :4], None))
    with pytest.raises(ShapeError, match=r"at attn_out; found \(3, 11, 4\)\n(.|\n)*layer 1"):
        all_layers(lm, "attn_out")


def choice(**changes: object) -> SimpleNamespace:
    """What an ActivationsConfig has; models are loaded by hand."""
    return SimpleNamespace(
        **({"model": None, "hookpoint": "resid_post", "layers": None, "second_model": None} | changes)
    )


@pytest.fixture(scope="module")
def twins(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LanguageModel]:
    """Two models of one tokenizer; the second has seen some training, as it were."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("twin") / "model"))
    first, second = (
        load_language_model(model_config(where), toyworld=None, device=CPU) for where in (tiny_model_dir, folder)
    )
    torch.manual_seed(3)
    for parameter in second.model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    second.model.save_pretrained(folder)
    return first, load_language_model(model_config(folder), toyworld=None, device=CPU)


@pytest.mark.parametrize("layers", [None, (1,)])
def test_places_of_two_models_follow_each_other(
    twins: tuple[LanguageModel, LanguageModel], layers: tuple[int, ...] | None
) -> None:
    both = activations_of(choice(layers=layers), twins)
    chosen = layers or (0, 1)
    assert both.places == (
        *(f"resid_post.{layer}" for layer in chosen),
        *(f"second.resid_post.{layer}" for layer in chosen),
    )
    assert (both.n_layers, both.d_model, both.bos_id) == (2 * len(chosen), 16, 1)
    assert both.digests == {"model_digest": twins[0].digest, "second_model_digest": twins[1].digest}
    assert twins[0].digest != twins[1].digest
    found, outputs = both(TOKENS, KEEP)
    assert outputs is None
    expected = torch.cat([capture_sites(lm, TOKENS, "resid_post", chosen)[KEEP] for lm in twins], dim=1)
    assert torch.equal(found, expected)
    assert (found[:, 0] - found[:, len(chosen)]).abs().max() > 1e-3


def test_the_finer_precision_of_two(twins: tuple[LanguageModel, LanguageModel]) -> None:
    first, second = (lm.name for lm in twins)
    loaded = load_sites(
        choice(model=model_config(Path(first), "bfloat16"), second_model=model_config(Path(second))),
        toyworld=None,
        device=CPU,
    )
    assert [lm.model.dtype for lm in loaded.lms] == [torch.bfloat16, torch.float32]
    assert loaded(TOKENS, KEEP)[0].dtype == torch.float32
    again = load_sites(choice(), toyworld=None, device=CPU, first=twins[0])
    assert again == Sites((twins[0],), "resid_post", ((0, 1),))


def test_models_that_do_not_go_together(twins: tuple[LanguageModel, LanguageModel], tmp_path: Path) -> None:
    first = twins[0]
    loaded = load_language_model(model_config(make_tiny_model(tmp_path / "wide")), toyworld=None, device=CPU)
    wider = dataclasses.replace(loaded, d_model=32)
    with pytest.raises(ConfigError, match=rf"d_model: that of {first.name} is 16; found 32 of {wider.name}\n"):
        activations_of(choice(), [first, wider])
    text = (tmp_path / "wide" / "tokenizer.json").read_text()
    assert '"a"' in text
    (tmp_path / "wide" / "tokenizer.json").write_text(text.replace('"a"', '"Ā"', 1))
    other = load_language_model(model_config(tmp_path / "wide"), toyworld=None, device=CPU)
    with pytest.raises(ConfigError, match=rf"one tokenizer: that of {first.name} (.|\n)*cache.second_model"):
        activations_of(choice(), [first, other])


def test_layers_that_a_model_does_not_have(twins: tuple[LanguageModel, LanguageModel]) -> None:
    with pytest.raises(ConfigError, match=r"layers from 0 to 1(.|\n)*found 2\n(.|\n)*cache\.layers"):
        activations_of(choice(layers=(0, 2)), twins)
