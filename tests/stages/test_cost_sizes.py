"""Bytes by arithmetic: those of the codecs' arrays, of transcoders and of checkpoints as they are made."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import REPOSITORY
from tests.training.helpers import tiny

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.compose import load_run
from circuitmill.config.train import NonlinearityConfig, TrainConfig
from circuitmill.core import codecs
from circuitmill.core.adapters import adapt, merged
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError
from circuitmill.stages import cost_sizes
from circuitmill.stores.clt import save_clt
from circuitmill.stores.transcoders import as_clt, is_plain_clt, save_transcoder
from circuitmill.training.parallel.census import Shape, count
from circuitmill.training.parallel.memory import optimizer_bytes
from circuitmill.training.state import make_state

OPTIONS = sorted(path.stem for path in (REPOSITORY / "config/train").glob("*.yaml"))
FORMS = {
    "clt": ArchitectureConfig(),
    "plt": ArchitectureConfig(topology="plt"),
    "sae": ArchitectureConfig(topology="sae"),
    "skip": ArchitectureConfig(skip=True),
    "target": ArchitectureConfig(decoder="target"),
    "target, scaled": ArchitectureConfig(decoder="target", pair_scale=True, pair_offset=True),
    "source": ArchitectureConfig(decoder="source"),
    "low rank": ArchitectureConfig(decoder="low_rank", rank=3),
    "molt": ArchitectureConfig(topology="molt", ranks=(4, 2)),
    "models": ArchitectureConfig(topology="crosscoder", models=2, shared=5),
    "matryoshka": ArchitectureConfig(prefixes=(9, 30)),
}


def of_form(form: ArchitectureConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(tiny(**changes), n_features=30, architecture=form)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_codecs_have_the_size_of_their_arrays(codec: str):
    assert set(cost_sizes.CODECS) == set(codecs.CODECS)
    cached = load_run("gpt2").config("cache")
    for group, d_model in ((32, 768), (64, 64), (16, 48), (1000, 24)):
        own = dataclasses.replace(cached, codec=codec, group_channels=group)
        arrays = codecs.make_codec(codec, 3, d_model, group).arrays().values()
        one = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays)
        assert cost_sizes.in_memory(own, 3, d_model) == 2 * one
        assert cost_sizes.in_memory(dataclasses.replace(own, targets="recomputed"), 3, d_model) == one
        if codec != "entropy":
            assert cost_sizes.on_disk(own, 3, d_model) == 2 * one + 16
    entropy = dataclasses.replace(cached, codec="entropy", bits=2.5)
    assert cost_sizes.on_disk(entropy, 3, 768) == 2 * 3 * 768 * 2.5 / 8 + 16


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_codecs_are_impossible_where_they_are_refused(codec: str):
    for group, d_model in ((32, 768), (34, 34), (34, 35), (16, 40), (5, 5)):
        try:
            codecs.make_codec(codec, 3, d_model, group)
            expected = ""
        except ConfigError as error:
            expected = error.expected
        assert cost_sizes.codec_problem(codec, d_model, group) == expected


def counted(cfg: TrainConfig) -> None:
    """Compare with a transcoder that is made."""
    made = {each.name: (each.shape, each.trained) for each in count(cfg, Shape(4, 24)).parameters}
    assert {each.name: (each.shape, each.trained) for each in cost_sizes.parameters(cfg, 4, 24)} == made


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_of_every_option(option: str):
    overrides = [f"train={option}"]
    overrides += ["cache=two_models"] if option == "model_diff" else []
    overrides += ["cache=resid_post"] if option in ("sae", "crosscoder") else []
    overrides += ["train.base=other/main"] if option in ("adapter", "end_to_end") else []
    counted(load_run("demo", overrides).config("train", "main"))


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_every_form(form: str):
    counted(of_form(FORMS[form]))
    counted(of_form(FORMS[form], nonlinearity=NonlinearityConfig("topk", k=4.0), base="other"))


def test_parameters_with_an_adapter():
    counted(dataclasses.replace(tiny(), base="other", adapter_rank=2))
    counted(dataclasses.replace(of_form(FORMS["source"], base="other"), adapter_rank=2))


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer__name": "adamw"},
    "adam8bit": {"optimizer__name": "adam8bit"},
    "muon": {"optimizer__name": "muon"},
    "schedule_free": {"optimizer__name": "schedule_free"},
    "moments": {"optimizer__moments": "bf16"},
    "bf16": {"optimizer__precision": "bf16"},
    "lazy": {"optimizer__lazy": True},
    "relu": {"nonlinearity": NonlinearityConfig("relu")},
}
EIGHT_BIT = tiny(optimizer__name="adam8bit", n_features=1024, init__l0=64.0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lazy"])
def test_optimizers_keep_what_the_plan_of_memory_says(name: str):
    for cfg in (tiny(**OPTIMIZERS[name]), EIGHT_BIT):
        planned = sum(optimizer_bytes(each, cfg) for each in count(cfg, Shape(2, 6)).parameters)
        assert sum(cost_sizes.optimizer_bytes(each, cfg) for each in cost_sizes.parameters(cfg, 2, 6)) == planned


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam8bit"])
@pytest.mark.parametrize("form", ["clt", "target, scaled"])
def test_a_checkpoint_has_the_planned_size(name: str, form: str):
    if name == "lazy" and form != "clt":
        pytest.skip("the same as of clt: decoders wait")
    cfg = of_form(FORMS[form], **OPTIMIZERS[name])
    transcoder = Transcoder(4, 30, 24, FORMS[form])
    transcoder.log_threshold.requires_grad_(cfg.nonlinearity.name == "jumprelu")
    state = make_state(cfg, transcoder)
    for parameter in state.optimizer.names:
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step(1e-3, norm=1.0, number=0)
    # what random generators, steps and groups take does not grow with the transcoder
    tensors = state.tensors()
    fixed = {"random_state", "step", "reached", "decay_from", "optimizer.groups"}
    small = [key for key, value in tensors.items() if value.numel() <= 4 and key.startswith("optimizer/")]
    by_row = [key for key in tensors if key.startswith("optimizer/row_")]
    size = sum(value.nbytes for key, value in tensors.items() if key not in {*fixed, *small, *by_row, "l0", "least"})
    assert size == cost_sizes.checkpoint_bytes(cfg, 4, 24)
    assert sum(tensors[key].nbytes for key in by_row) < 0.1 * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_finished_transcoder_has_the_planned_size(form: str, rank: int, tmp_path: Path):
    if rank and form in ("molt", "target, scaled"):
        pytest.skip("there is no adapter for it")
    cfg = of_form(FORMS[form])
    transcoder = Transcoder(4, 30, 24, FORMS[form])
    if rank:
        cfg = dataclasses.replace(cfg, base="other", adapter_rank=rank)
        transcoder = merged(adapt(transcoder, rank, generator=torch.Generator().manual_seed(0)))
    one = torch.ones(4, 24)
    folded = fold(transcoder, Scaling(one, one, torch.zeros_like(one), torch.zeros_like(one)))
    save_transcoder(tmp_path / "model", folded, scan="", model_name="")
    if not is_plain_clt(folded) and not folded.architecture.untraceable:
        save_clt(tmp_path / "circuit_tracer", as_clt(folded), scan="", model_name="")
    files = list(tmp_path.rglob("*.safetensors"))
    planned = cost_sizes.transcoder_bytes(cfg, 4, 24)
    # the head of a file has a few hundred bytes
    assert planned < sum(path.stat().st_size for path in files) < planned + 1200 * len(files)


def test_a_training_keeps_as_many_checkpoints_as_it_is_told():
    cfg = dataclasses.replace(tiny(), keep_checkpoints=2, checkpoint_l0=(5.0, 3.0))
    one, final = cost_sizes.checkpoint_bytes(cfg, 2, 6), cost_sizes.transcoder_bytes(cfg, 2, 6)
    assert one > final > 0
    # two newest, two of checkpoint_l0, and one that is being written
    assert cost_sizes.train_bytes(cfg, 2, 6) == 5 * one
