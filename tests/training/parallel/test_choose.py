"""What a named strategy and `auto` come to, on so many ranks with so much memory."""

import pytest
import torch
from tests.training.helpers import tiny

from circuitmill import distributed
from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.parallel import ParallelConfig
from circuitmill.errors import ConfigError
from circuitmill.training.parallel.census import Shape
from circuitmill.training.parallel.choose import choose, decide, memory_of
from circuitmill.training.parallel.plan import Situation, estimates

SHAPE, PLENTY = Shape(2, 6), 10**12


def decided(strategy: str, ranks: int, memory: int = PLENTY, feature_ranks: int = 0, **changes):
    own = ParallelConfig(strategy, feature_ranks=feature_ranks)  # type: ignore[arg-type]
    return decide(tiny(parallel=own, **changes), SHAPE, ranks, memory, Situation())


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp", "fsdp", "features", "mesh"])
def test_one_rank_shares_nothing(strategy):
    assert decided(strategy, 1).strategy == "single"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "features"])
def test_what_is_named_is_taken(strategy):
    assert decided(strategy, 2).strategy == strategy


def test_a_mesh_takes_the_fewest_that_fit_or_as_many_as_are_named():
    large = {"n_features": 65_536, "init__encoder_bias": "zero"}
    found = estimates(tiny(**large), SHAPE, 8, PLENTY)
    sizes = {each.feature_ranks: each.total for each in found if each.strategy == "mesh"}
    assert set(sizes) == {2, 4} and sizes[4] < sizes[2]
    assert decided("mesh", 8, **large).feature_ranks == 2
    assert decided("mesh", 8, memory=sizes[4], **large).feature_ranks == 4
    assert decided("mesh", 8, feature_ranks=4, **large).feature_ranks == 4


def test_what_does_not_fit_is_said_and_not_refused():
    assert not decided("features", 2, memory=1000).fits


def test_what_is_impossible_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"2 ranks can share by strategy single; found 2 ranks"):
        decided("single", 2)
    form = {"architecture": ArchitectureConfig("molt", ranks=(2,)), "init__encoder_bias": "zero"}
    with pytest.raises(
        ConfigError, match=r"strategy features; found transforms of several ranks\n  where: train\.para"
    ):
        decided("features", 2, **form)
    assert decided("auto", 2, **form).strategy == "ddp"


def test_a_rank_has_its_share_of_what_the_host_can_give(monkeypatch):
    whole = memory_of(torch.device("cpu"))
    monkeypatch.setattr(distributed, "local_size", lambda: 4)
    assert memory_of(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.2)
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < whole < total


def test_one_rank_is_arranged_without_a_group():
    ranks = distributed.Ranks(rank=0, size=1, local_rank=0)
    layout, planned = choose(tiny(), SHAPE, ranks, device=torch.device("cpu"), situation=Situation())
    assert layout.strategy == planned.strategy == "single" and layout.features.size == layout.data.size == 1
    assert not torch.distributed.is_initialized()
