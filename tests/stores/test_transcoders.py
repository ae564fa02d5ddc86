"""Finished transcoders of every architecture on disk, and their way to circuit-tracer."""

from pathlib import Path

import pytest
import torch
import yaml
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file

from circuitmill import cli
from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores import transcoders
from circuitmill.stores.manifest import StageOutput
from circuitmill.stores.transcoders import (
    as_clt,
    circuit_tracer_folder,
    export_clt,
    load_transcoder,
    read_architecture,
    read_decoder,
    save_transcoder,
)

LABEL = {"scan": "tiny-scan", "model_name": "tiny-model"}
N_LAYERS, N_FEATURES, D_MODEL = 3, 6, 5

TRACEABLE = {
    "clt": {},
    "plt": {"topology": "plt"},
    "target-tied": {"decoder": "target"},
    "target-tied with scale": {"decoder": "target", "pair_scale": True},
    "source-tied": {"decoder": "source"},
    "source-tied with scale": {"decoder": "source", "pair_scale": True},
    "low rank": {"decoder": "low_rank", "rank": 2},
    "matryoshka": {"prefixes": (2, 6)},
    "matryoshka plt": {"topology": "plt", "prefixes": (2, 6)},
}
UNTRACEABLE = {
    "skip": {"skip": True},
    "offsets": {"decoder": "source", "pair_offset": True},
    "acausal": {"topology": "acausal"},
    "acausal low rank": {"topology": "acausal", "decoder": "low_rank", "rank": 2},
    "sae": {"topology": "sae"},
    "crosscoder": {"topology": "crosscoder"},
    "crosscoder over models": {"topology": "crosscoder", "models": 3, "shared": 2},
    "molt": {"topology": "molt", "ranks": (3, 1)},
}


@torch.no_grad()
def random(**architecture: object) -> Transcoder:
    """Random weights; the first feature of every source has the threshold of a ReLU."""
    made = Transcoder(N_LAYERS, N_FEATURES, D_MODEL, ArchitectureConfig(**architecture))
    generator = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made.log_threshold[:, 0] = -torch.inf
    return made.requires_grad_(False)


def inputs() -> torch.Tensor:
    return torch.randn(40, N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("form", [*TRACEABLE, *UNTRACEABLE])
def test_round_trip(tmp_path: Path, form: str) -> None:
    transcoder, x = random(**(TRACEABLE | UNTRACEABLE)[form]), inputs()
    save_transcoder(tmp_path / "model", transcoder, **LABEL)
    loaded = load_transcoder(tmp_path / "model")
    torch.testing.assert_close(loaded(x), transcoder(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded.encode(x) > 0, transcoder.encode(x) > 0) and (loaded.encode(x) > 0).any()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    plain = form in ("clt", "matryoshka")
    # what prefixes were trained with does not matter afterwards, and circuit-tracer's layout has no place for it
    assert loaded.architecture == (ArchitectureConfig() if plain else transcoder.architecture)
    assert read_architecture(tmp_path / "model") == loaded.architecture
    assert (tmp_path / "model" / "config.yaml").exists() == plain


@pytest.mark.parametrize("form", TRACEABLE)
def test_circuit_tracer_reconstructs_the_same(tmp_path: Path, form: str) -> None:
    transcoder, x = random(**TRACEABLE[form]), inputs()
    save_transcoder(tmp_path / "model", transcoder, **LABEL)
    export_clt(tmp_path / "model", tmp_path / "exported")
    theirs, config = load_transcoder_from_hub(
        str((tmp_path / "exported").resolve()), dtype=torch.float32, device=torch.device("cpu")
    )
    assert isinstance(theirs, CrossLayerTranscoder)
    assert (config["scan"], config["model_name"]) == ("tiny-scan", "tiny-model")
    # circuit-tracer 0.5.0 cuts its reconstruction off after the last token on which a feature fires
    x[-1] = transcoder.W_enc[:, 0] * 100
    features = theirs.encode(x.transpose(0, 1))
    dense = features.to_dense() if features.is_sparse else features
    torch.testing.assert_close(dense.transpose(0, 1), transcoder.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(features).transpose(0, 1), transcoder(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", TRACEABLE)
def test_as_clt_is_the_same_function(form: str) -> None:
    transcoder, x = random(**TRACEABLE[form]), inputs()
    clt = as_clt(transcoder)
    assert clt.architecture == ArchitectureConfig()
    torch.testing.assert_close(clt(x), transcoder(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", UNTRACEABLE)
def test_what_is_no_clt_is_not_exported(tmp_path: Path, form: str) -> None:
    transcoder = random(**UNTRACEABLE[form])
    reason = transcoder.architecture.untraceable
    with pytest.raises(ConfigError, match=f"a transcoder that can be traced; found {reason}"):
        as_clt(transcoder)
    save_transcoder(tmp_path / "model", transcoder, **LABEL)
    with pytest.raises(ConfigError, match=reason):
        export_clt(tmp_path / "model", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_export_does_not_touch_what_is_there(tmp_path: Path) -> None:
    save_transcoder(tmp_path / "model", random(), **LABEL)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "W_enc_0.safetensors").write_bytes(b"another model")
    with pytest.raises(StoreError, match="a new or empty folder; found something in it"):
        export_clt(tmp_path / "model", tmp_path / "exported")
    assert (tmp_path / "exported" / "W_enc_0.safetensors").read_bytes() == b"another model"


def test_export_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transcoder = random(decoder="source", pair_scale=True)
    output = StageOutput("train", ArchitectureConfig(), {}, tmp_path / "train")
    save_transcoder(output.path("model"), transcoder, **LABEL)
    output.finish({})
    command = ["export", "--train", str(tmp_path / "train/manifest.json"), "--out", str(tmp_path / "exported")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "exported")
    torch.testing.assert_close(load_transcoder(tmp_path / "exported")(inputs()), transcoder(inputs()))
    assert cli.main(command) == 1
    assert "a new or empty folder" in capsys.readouterr().err


def test_stage_attribute_finds_circuit_tracer_s_layout(tmp_path: Path) -> None:
    for name, form in (("model", {}), ("circuit_tracer", {"topology": "plt"})):
        save_transcoder(tmp_path / name / "model", random(**form), **LABEL)
        assert circuit_tracer_folder(tmp_path / name) == tmp_path / name / name


def test_one_layer_s_decoder_is_read_alone(tmp_path: Path) -> None:
    transcoder, folder = random(), tmp_path / "model"
    save_transcoder(folder, transcoder, **LABEL)
    (folder / "W_dec_0.safetensors").unlink()
    for layer in (1, 2):
        torch.testing.assert_close(read_decoder(folder, layer), transcoder.W_dec[layer].detach())
    with pytest.raises(StoreError, match=r"W_dec_0\.safetensors"):
        read_decoder(folder, 0)
    (folder / "W_enc_1.safetensors").rename(folder / "W_dec_0.safetensors")
    with pytest.raises(StoreError, match=r"one tensor W_dec_0 \[feature target d_model\]"):
        read_decoder(folder, 0)


def test_decoders_of_other_forms_are_made_from_what_they_keep(tmp_path: Path) -> None:
    transcoder = random(decoder="low_rank", rank=2)
    save_transcoder(tmp_path / "model", transcoder, **LABEL)
    torch.testing.assert_close(read_decoder(tmp_path / "model", 1), transcoder.decoder_block(1))


def test_saving_another_architecture_leaves_no_file_of_the_first(tmp_path: Path) -> None:
    for form in ({}, {"topology": "molt", "ranks": (3, 1)}, {}):
        save_transcoder(tmp_path / "model", random(**form), **LABEL)
        assert load_transcoder(tmp_path / "model").architecture == ArchitectureConfig(**form)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_transcoder(tmp_path / "model", random(topology="molt", ranks=(3, 1)), **LABEL)
    return tmp_path / "model"


def redescribe(folder: Path, **changes: object) -> None:
    path = folder / transcoders.ARCHITECTURE
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def retensor(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / transcoders.TENSORS
    tensors = load_file(path) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: redescribe(folder, format=7), "format 1; found 7"),
        (lambda folder: redescribe(folder, architecture={"topology": "mlot"}), "a description of a transcoder; found"),
        (lambda folder: redescribe(folder, n_features=7), "a description of a transcoder; found"),
        (lambda folder: (folder / transcoders.ARCHITECTURE).write_text("[1"), "a description of a transcoder; found"),
        (lambda folder: (folder / transcoders.ARCHITECTURE).unlink(), "config.yaml"),
        (lambda folder: (folder / transcoders.TENSORS).unlink(), "transcoder.safetensors"),
        (lambda folder: redescribe(folder, d_model=4), "transcoder.safetensors"),
        (lambda folder: retensor(folder, b_dec=None), "b_dec"),
        (lambda folder: retensor(folder, W_skip=torch.eye(3)), "W_skip"),
        (lambda folder: retensor(folder, threshold=-torch.ones(3, 6)), "thresholds of at least zero"),
        (lambda folder: retensor(folder, b_dec=torch.full((3, 5), torch.nan)), "finite values in b_dec"),
    ],
)
def test_damage_is_named(folder: Path, damage, words: str) -> None:
    damage(folder)
    with pytest.raises(StoreError, match=words.replace("(", r"\(")):
        load_transcoder(folder)
