import subprocess
import sys

import pytest
import torch
from tests.stages.small_run import N_FEATURES, N_LAYERS, make_cache, make_train, random_transcoder

import circuitmill
from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError, StoreError
from circuitmill.lm.replacement import replacement_logits
from circuitmill.stores.transcoders import save_transcoder


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("api")
    paths = make_cache(folder, tiny_model_dir)
    return make_train(folder / "train", paths["cache"], random_transcoder(paths["cache"]))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, local_files_only=True).eval()


TOKENS = torch.tensor([[1, 5, 9, 2, 7], [1, 3, 3, 8, 4]])


def test_any_way_to_name_it_loads_the_same(made):
    first = circuitmill.load(made)
    for path in (str(made.parent), made.parent / "model"):
        assert torch.equal(circuitmill.load(path).W_enc, first.W_enc)
    assert (first.n_layers, first.n_features) == (N_LAYERS, N_FEATURES)


def test_other_architectures_load_the_same_way(tmp_path):
    molt = Transcoder(2, 6, 4, ArchitectureConfig(topology="molt", ranks=(2, 1)))
    torch.nn.init.normal_(molt.decoder.U)
    save_transcoder(tmp_path / "model", molt, scan="s", model_name="m")
    assert circuitmill.load(tmp_path).architecture == molt.architecture


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(StoreError, match="a transcoder: architecture.yaml, or config.yaml"):
        circuitmill.load(tmp_path)


def test_activations_are_what_goes_in_and_out(model):
    seen = []
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    x, y = circuitmill.activations(model, TOKENS)
    handle.remove()
    assert x.shape == y.shape == (10, N_LAYERS, 16)
    torch.testing.assert_close(x[:, 1], seen[0][0].flatten(0, 1))
    torch.testing.assert_close(y[:, 1], seen[0][1].flatten(0, 1))


def test_replaced_equals_the_stages_replacement(made, model, tiny_model_dir):
    from circuitmill.config.model import ModelConfig
    from circuitmill.lm.load import load_language_model

    clt = circuitmill.load(made)
    lm = load_language_model(
        ModelConfig("folder", str(tiny_model_dir), "", "float32"), toyworld=None, device=torch.device("cpu")
    )
    before = model(TOKENS).logits
    with circuitmill.replaced(model, clt, bos_id=lm.bos_id):
        inside = model(input_ids=TOKENS).logits
    torch.testing.assert_close(inside, replacement_logits(lm, clt, TOKENS))
    assert not torch.allclose(inside, before)
    assert torch.equal(model(TOKENS).logits, before)
    with circuitmill.replaced(model, clt, layers=[], bos_id=None):
        assert torch.equal(model(TOKENS).logits, before)


def test_gradients_pass_through(made, model):
    clt = circuitmill.load(made).requires_grad_()
    with circuitmill.replaced(model, clt):
        model(TOKENS).logits.sum().backward()
    assert clt.W_enc.grad is not None and clt.W_enc.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused(model):
    with (
        pytest.raises(ShapeError, match="a transcoder of the MLPs of 2 layers; found topology clt over 3"),
        circuitmill.replaced(model, Transcoder(3, 4, 16)),
    ):
        pass
    sae = Transcoder(2, 4, 16, ArchitectureConfig(topology="sae"))
    with pytest.raises(ShapeError, match="found topology sae"), circuitmill.replaced(model, sae):
        pass


def test_a_hooked_transformer_is_replaced_too(made):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=20, act_fn="gelu", d_mlp=32
    )
    hooked = HookedTransformer(config).eval()
    _, cache = hooked.run_with_cache(TOKENS)
    x, y = circuitmill.activations(hooked, TOKENS)
    torch.testing.assert_close(y[:, 0], cache["blocks.0.hook_mlp_out"].flatten(0, 1))
    clt = circuitmill.load(made)
    with circuitmill.replaced(hooked, clt):
        _, inside = hooked.run_with_cache(TOKENS)
    torch.testing.assert_close(inside["blocks.0.hook_mlp_out"].flatten(0, 1), clt.decode(clt.encode(x))[:, 0])


def test_the_package_itself_starts_without_torch():
    code = "import sys, circuitmill; assert 'torch' not in sys.modules; circuitmill.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        circuitmill.nothing  # noqa: B018
