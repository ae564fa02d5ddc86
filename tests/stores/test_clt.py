import re
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import StoreError
from circuitmill.stores.clt import load_clt, save_clt


@pytest.fixture
def transcoder():
    made = Transcoder(n_layers=3, n_features=7, d_model=5)
    init.uniform(made, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc.normal_()
        made.b_dec.normal_()
        made.log_threshold.normal_()
    return made


@pytest.fixture
def folder(tmp_path, transcoder):
    save_clt(tmp_path / "model", transcoder, scan="tiny", model_name="tiny-model")
    return tmp_path / "model"


def test_round_trip(folder, transcoder):
    loaded = load_clt(folder)
    for name, parameter in transcoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], parameter, rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_are_readable_by_everybody(folder):
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path


def test_circuit_tracer_loads_it_and_reconstructs_the_same(folder, transcoder):
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt as their_load

    theirs = their_load(
        str(folder),
        "mlp.hook_in",
        "mlp.hook_out",
        scan="tiny",
        device=torch.device("cpu"),
        dtype=torch.float32,
        lazy_decoder=False,
    )
    x = torch.randn(11, 3, 5)
    # circuit-tracer 0.5.0 cuts its reconstruction off after the last token on which a feature fires
    x[-1] = transcoder.W_enc[:, 0] * 100
    with torch.no_grad():
        ours = transcoder(x)
        features = theirs.encode(x.transpose(0, 1))
        reconstruction = theirs.decode(features)
    torch.testing.assert_close(features.transpose(0, 1).to_dense(), transcoder.encode(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction.transpose(0, 1), ours, rtol=1e-5, atol=1e-5)


def test_circuit_tracer_takes_the_folder_as_a_local_model(folder):
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    theirs, config = load_transcoder_from_hub(str(folder.resolve()), dtype=torch.float32, device=torch.device("cpu"))
    assert theirs.n_layers == 3
    assert config["scan"] == "tiny"
    assert config["feature_input_hook"] == "mlp.hook_in"


def test_saving_again_leaves_no_file_of_the_larger_model(folder, transcoder):
    smaller = Transcoder(n_layers=2, n_features=7, d_model=5)
    save_clt(folder, smaller, scan="tiny", model_name="tiny-model")
    assert load_clt(folder).n_layers == 2


def test_low_precision_files_are_read_as_float32(folder, transcoder):
    path = folder / "W_dec_0.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    loaded = load_clt(folder)
    assert loaded.W_dec[0].dtype == torch.float32
    torch.testing.assert_close(loaded.W_dec[0], transcoder.W_dec[0].detach().bfloat16().float(), rtol=0, atol=0)


def rewrite(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "W_enc_1.safetensors").unlink(), "W_enc_1.safetensors"),
        (lambda f: (f / "W_dec_2.safetensors").unlink(), "W_dec_2.safetensors"),
        (lambda f: (f / "W_enc_3.safetensors").write_bytes(b""), "expected 4 decoder files"),
        (lambda f: (f / "other.safetensors").write_bytes(b""), "other.safetensors"),
        (
            lambda f: (f / "W_enc_0.safetensors").write_bytes((f / "W_enc_0.safetensors").read_bytes()[:-8]),
            "W_enc_0.safetensors",
        ),
        (
            lambda f: rewrite(f, "W_dec_1.safetensors", lambda t: t.update(W_dec_1=torch.zeros(7, 3, 5))),
            "W_dec_1.safetensors",
        ),
        (lambda f: rewrite(f, "W_enc_1.safetensors", lambda t: t.pop("threshold_1")), "threshold_1"),
        (
            lambda f: rewrite(f, "W_enc_1.safetensors", lambda t: t.update(threshold_1=-torch.ones(7))),
            "expected values of at least zero in threshold_1",
        ),
        (
            lambda f: rewrite(f, "W_enc_1.safetensors", lambda t: t.update(b_enc_1=torch.zeros(7).int())),
            "floating-point",
        ),
        (
            lambda f: rewrite(f, "W_dec_1.safetensors", lambda t: t["W_dec_1"].fill_(float("nan"))),
            "expected finite values in W_dec_1",
        ),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml"),
        (lambda f: (f / "config.yaml").write_text("model_kind: transcoder_set"), "found transcoder_set"),
    ],
)
def test_damage_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(StoreError, match=re.escape(words)):
        load_clt(folder)
