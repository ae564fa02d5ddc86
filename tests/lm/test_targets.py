import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lm.conftest import random_model
from torch import nn
from transformers import AutoTokenizer

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import capture_mlp
from circuitmill.lm.hookpoints import FAMILIES, mlps
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.targets import MlpTargets, mlp_targets

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
Maker = Callable[[str], LanguageModel]


@pytest.fixture
def folder_of(tmp_path: Path, tiny_model_dir: Path) -> Callable[[str], Path]:
    def make(architecture: str) -> Path:
        folder = tmp_path / architecture
        random_model(architecture).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
        return folder

    return make


def load(folder: Path, dtype: str = "float32") -> MlpTargets:
    cfg = ModelConfig(source="folder", name=str(folder), revision="", dtype=dtype)
    return mlp_targets(cfg, toyworld=None, device=CPU)


def captured(lm: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, outputs = capture_mlp(lm, TOKENS)
    return inputs.flatten(0, 1), outputs.flatten(0, 1)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_recomputed_is_captured(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    inputs, outputs = captured(lm)
    found = load(Path(lm.name))(inputs)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.std() > 0.01
    torch.testing.assert_close(found, outputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_a_model_in_bfloat16_runs_in_bfloat16(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    lm.model.to(torch.bfloat16)
    inputs, outputs = captured(lm)
    assert inputs.dtype == torch.bfloat16
    targets = load(Path(lm.name), "bfloat16")
    found = targets(inputs.float())
    # one place of bfloat16 (2^-8) where a sum is added up in another order; nearly everywhere nothing
    torch.testing.assert_close(found, outputs.float(), atol=2**-8, rtol=2**-7)
    assert (found == outputs.float()).float().mean() > 0.95
    assert torch.equal(found, found.bfloat16().float())
    assert targets.digest != load(Path(lm.name)).digest


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_blocks_make_no_difference(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    inputs, _ = captured(lm)
    targets = MlpTargets.of(lm)
    whole = targets(inputs)
    assert targets.block_tokens > len(inputs)
    seen: list[int] = []
    mlps(lm.model)[1].register_forward_hook(lambda _m, arguments, _o: seen.append(arguments[0].shape[1]))
    targets.block_tokens = 7
    torch.testing.assert_close(targets(inputs), whole, atol=1e-6, rtol=1e-5)
    assert seen == [7, 7, 7, 7, 5]
    assert targets(inputs[:0]).shape == (0, lm.n_layers, lm.d_model)


def test_the_hidden_layer_is_bounded() -> None:
    wide = nn.Sequential(nn.Linear(16, 2**16), nn.Linear(2**16, 16))
    targets = MlpTargets([wide], d_model=16, dtype=torch.float32, name="wide", digest="")
    assert targets.block_tokens == 2**25 // 2**16


def test_autocast_training_mode_and_gradients_change_nothing(lm_of: Maker) -> None:
    lm = lm_of("gpt2")
    inputs, outputs = captured(lm)
    targets = load(Path(lm.name))
    assert not any(module.training for held in targets._modules for module in held.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = targets(inputs.requires_grad_())
    assert not found.requires_grad
    torch.testing.assert_close(found, outputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_nothing_but_mlps_is_held(
    folder_of: Callable[[str], Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, weakref.ref] = {}

    def load_and_watch(*arguments: Any, **options: Any) -> LanguageModel:
        lm = load_language_model(*arguments, **options)
        loaded.update({name: weakref.ref(parameter) for name, parameter in lm.model.named_parameters()})
        return lm

    monkeypatch.setattr("circuitmill.lm.targets.load_language_model", load_and_watch)
    targets = load(folder_of(architecture))
    alive = {name: reference() for name, reference in loaded.items() if reference() is not None}
    assert alive and all(".mlp." in name for name in alive) and len(alive) < len(loaded)
    own = [parameter for module in targets._modules for parameter in module.parameters()]
    assert {id(parameter) for parameter in own} == {id(parameter) for parameter in alive.values()}
    assert sum(p.numel() for p in own) == sum(
        p.numel() for m in mlps(random_model(architecture)) for p in m.parameters()
    )
    # no view into the memory of a whole file
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in own)
    assert not any(p.requires_grad for p in own)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_digest_follows_mlp_weights_only(lm_of: Maker, architecture: str) -> None:
    lm = lm_of(architecture)
    digest = MlpTargets.of(lm).digest
    assert load(Path(lm.name)).digest == digest
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if ".mlp." not in name:
                parameter.add_(1)
    assert MlpTargets.of(lm).digest == digest
    with torch.no_grad():
        next(mlps(lm.model)[2].parameters()).view(-1)[0] += 1
    assert MlpTargets.of(lm).digest != digest


def test_digest_does_not_depend_on_files(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("llama")
    digest = load(folder).digest
    split = Path(shutil.copytree(folder, tmp_path / "split"))
    (split / "model.safetensors").unlink()
    random_model("llama").save_pretrained(split, max_shard_size="10KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    assert load(split).digest == digest


def test_digest_follows_the_activation(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    digest = load(folder).digest
    settings = json.loads((folder / "config.json").read_text())
    for key, value, same in (("rms_norm_eps", 1e-3, True), ("hidden_act", "gelu", False)):
        (folder / "config.json").write_text(json.dumps({**settings, key: value}))
        assert (load(folder).digest == digest) is same


def test_moving(lm_of: Maker) -> None:
    targets = MlpTargets.of(lm_of("gpt2"))
    assert targets.to(torch.device("meta")) is targets
    assert {p.device.type for module in targets._modules for p in module.parameters()} == {"meta"}


def test_shapes_are_checked(lm_of: Maker) -> None:
    targets = MlpTargets.of(lm_of("gpt2"))
    with pytest.raises(ShapeError, match=r"3 layers and width 16(.|\n)*found 2 layers, width 16(.|\n)*fix: "):
        targets(torch.zeros(5, 2, 16))
    with pytest.raises(ShapeError, match=r"found 3 layers, width 8"):
        targets(torch.zeros(5, 3, 8))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(tmp_path)
