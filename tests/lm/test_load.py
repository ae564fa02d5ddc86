import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.lm.load import LanguageModel, load_language_model, load_tokenizer, model_location, tokenizer_digest

CPU = torch.device("cpu")


def _config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(source="folder", name=str(folder), revision="", dtype=dtype)


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_sizes_and_frozen_weights(tiny_model_dir: Path) -> None:
    lm = load_language_model(_config(tiny_model_dir), toyworld=None, device=CPU)
    assert (lm.n_layers, lm.d_model, lm.d_vocab, lm.context, lm.bos_id) == (2, 16, 300, 32, 1)
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_dtype(tiny_model_dir: Path) -> None:
    lm = load_language_model(_config(tiny_model_dir, "bfloat16"), toyworld=None, device=CPU)
    assert lm.model.dtype == torch.bfloat16


def test_digest_follows_the_weights(tiny_model_dir: Path, copied: Path) -> None:
    one = load_language_model(_config(tiny_model_dir), toyworld=None, device=CPU)
    same = load_language_model(_config(copied), toyworld=None, device=CPU)
    assert one.digest == same.digest
    with torch.no_grad():
        same.model.get_parameter("transformer.ln_f.weight").add_(1)
    same.model.save_pretrained(copied)
    assert load_language_model(_config(copied), toyworld=None, device=CPU).digest != one.digest


def test_embedded_model_is_below_the_stages_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    cfg = ModelConfig(source="toyworld", name="toyworld", revision="", dtype="float32")
    assert load_language_model(cfg, toyworld=tmp_path, device=CPU).n_layers == 2
    with pytest.raises(UpstreamError, match="--toyworld"):
        load_language_model(cfg, toyworld=None, device=CPU)


def test_an_early_snapshot_of_the_embedded_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("model", "early"):
        shutil.copytree(tiny_model_dir, tmp_path / name)
    names = {
        name: ModelConfig(source="toyworld", name=name, revision="", dtype="float32")
        for name in ("toyworld", "other", "early", "toyworld-early")
    }
    folders = {name: model_location(cfg, tmp_path) for name, cfg in names.items()}
    assert [Path(folders[name]).name for name in names] == ["model", "model", "model", "early"]
    shutil.rmtree(tmp_path / "early")
    with pytest.raises(ConfigError, match=r"/early\n(.|\n)*run stage toyworld again"):
        model_location(names["toyworld-early"], tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json(.|\n)*nowhere"):
        load_tokenizer(_config(tmp_path / "nowhere"), toyworld=None)


def test_missing_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"a model that transformers can load(.|\n)*safetensors"):
        load_language_model(_config(copied), toyworld=None, device=CPU)


def test_truncated_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StoreError, match="whole safetensors files"):
        load_language_model(_config(copied), toyworld=None, device=CPU)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="a model that transformers can load"):
        load_language_model(_config(copied), toyworld=None, device=CPU)


def test_bos_from_the_models_configuration(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    path.write_text(json.dumps(settings))
    (copied / "special_tokens_map.json").unlink()
    assert load_tokenizer(_config(copied), toyworld=None).bos_token_id == 1
    model = json.loads((copied / "config.json").read_text())
    model["bos_token_id"] = None
    (copied / "config.json").write_text(json.dumps(model))
    with pytest.raises(ConfigError, match="a BOS token"):
        load_tokenizer(_config(copied), toyworld=None)


def test_tokenizer_digest_follows_its_files(tiny_model_dir: Path, copied: Path) -> None:
    one = tokenizer_digest(load_tokenizer(_config(tiny_model_dir), toyworld=None))
    assert one == tokenizer_digest(load_tokenizer(_config(copied), toyworld=None))
    path = copied / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(settings))
    assert tokenizer_digest(load_tokenizer(_config(copied), toyworld=None)) != one


def test_weights_go_to_the_device_in_the_wanted_dtype(tiny_model_dir: Path) -> None:
    lm = load_language_model(_config(tiny_model_dir, "bfloat16"), toyworld=None, device=torch.device("cpu"))
    assert lm.pretrained.hf_device_map == {"": CPU}
    assert {(parameter.device, parameter.dtype) for parameter in lm.model.parameters()} == {(CPU, torch.bfloat16)}
    assert not any(hasattr(module, "_hf_hook") for module in lm.model.modules())


def test_attention_soft_caps_are_applied(lm_of: Callable[[str], LanguageModel]) -> None:
    lm = lm_of("gemma2")
    tokens = torch.randint(2, 258, (1, 11), generator=torch.Generator().manual_seed(0))
    found = lm.model(tokens).logits
    lm.pretrained.set_attn_implementation("sdpa")
    assert (lm.model(tokens).logits - found).abs().max() > 1e-3
    assert lm_of("gemma3_text").pretrained.config._attn_implementation == "sdpa"
