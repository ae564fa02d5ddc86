"""What a strategy needs: counted by hand for small trainings, compared with torch for what autograd keeps."""

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.helpers import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.parallel import STRATEGIES, ParallelConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig, TrainConfig
from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError
from circuitmill.training import precision
from circuitmill.training.objective import Moment, evaluate_batch
from circuitmill.training.parallel import activations
from circuitmill.training.parallel.census import Division, Shape, count
from circuitmill.training.parallel.memory import Memory, memory
from circuitmill.training.parallel.payload import Stored, payload
from circuitmill.training.parallel.plan import (
    SMALL_WIRE,
    Situation,
    divisions,
    estimates,
    impossible,
    propose,
)

SHAPE = Shape(2, 6)
MATRICES, VECTORS = 192 + 288, 32 + 32 + 12
"""Numbers: of W_enc [2 16 6], W_dec.0 [16 2 6] and W_dec.1 [16 1 6]; of b_enc, log_threshold [2 16] and b_dec [2 6]."""
PLENTY = 10**12


def need(cfg: TrainConfig, strategy: str = "single", ranks: int = 1, sharing: int = 1) -> Memory:
    census = count(cfg, SHAPE, fsdp_ranks=[ranks])
    return memory(cfg, SHAPE, census, Division(strategy, ranks, sharing), device="cpu", dead=0.0)


def test_parameters_are_counted_by_kind():
    assert count(tiny(), SHAPE).by_kind() == {
        "encoder": 192,
        "encoder biases": 32,
        "decoder": 288,
        "decoder biases": 12,
        "thresholds": 32,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (4 * (MATRICES + VECTORS),) * 2 + (8 * (MATRICES + VECTORS),)),
        # thresholds are not trained
        (
            {"nonlinearity": NonlinearityConfig("topk", k=4.0)},
            (4 * (MATRICES + VECTORS), 4 * (MATRICES + VECTORS - 32), 8 * (MATRICES + VECTORS - 32)),
        ),
        (
            {"optimizer__name": "muon"},
            (4 * (MATRICES + VECTORS), 4 * (MATRICES + VECTORS), 4 * MATRICES + 8 * VECTORS),
        ),
        (
            {"optimizer__precision": "bf16"},
            (2 * MATRICES + 4 * VECTORS, 2 * MATRICES + 4 * VECTORS, 8 * (MATRICES + VECTORS)),
        ),
        # the change alone: Q [2 16 3] and P [3 pairs, 3, 6]
        (
            {"base": "other", "adapter_rank": 3},
            (4 * (MATRICES + VECTORS + 96 + 54), 4 * (96 + 54), 8 * (96 + 54)),
        ),
    ],
)
def test_parameters_gradients_and_moments(changes: dict[str, Any], expected: tuple[int, int, int]):
    found = need(tiny(**changes))
    assert (found.weights, found.gradients, found.optimizer) == expected


def test_eight_bit_moments_of_large_parameters_only():
    cfg = tiny(n_features=1024, init__l0=64.0, optimizer__name="adam8bit")
    large, small = 2 * 1024 * 6 + (1024 * 2 * 6) + (1024 * 6), 2 * 1024 * 2 + 12
    assert need(cfg).optimizer == round(2 * (1 + 4 / 256) * large) + 8 * small


@pytest.mark.parametrize(
    ("strategy", "ranks", "sharing", "numbers"),
    [
        ("ddp", 2, 1, 556),
        ("features", 2, 2, 96 + 144 + 16 + 16 + 12),
        # 6, 6 and 4 features; b_dec is on every rank
        ("features", 3, 3, 72 + 108 + 12 + 12 + 12),
        ("mesh", 4, 2, 96 + 144 + 16 + 16 + 12),
        # the longest axis that is a multiple of the ranks: features, of b_dec the width
        ("fsdp", 2, 1, 96 + 96 + 48 + 16 + 16 + 6),
    ],
)
def test_what_of_the_parameters_is_on_a_rank(strategy: str, ranks: int, sharing: int, numbers: int):
    cfg = tiny(batch_tokens=48, pool_tokens=96)
    assert need(cfg, strategy, ranks, sharing).weights == 4 * numbers


def test_bytes_on_the_wire():
    cfg, stored = tiny(), Stored(2 * 4 * 12)

    def sent(strategy: str, ranks: int, sharing: int) -> Any:
        return payload(cfg, SHAPE, count(cfg, SHAPE, [ranks]), Division(strategy, ranks, sharing), stored)

    figures = 8 * (2 * 4 + 5 + 2 * 2)
    assert sent("single", 1, 1).step == {}
    assert sent("ddp", 2, 1).step == {"gradients": 4 * 556, "firings": 4 * 33, "figures": figures}
    features = sent("features", 2, 2)
    assert features.step == {"batch": 16 * 96, "reconstructions": 32 * 12 * 4, "figures": figures}
    assert sum(features.dead.values()) == 2 * 32 * 5 * 4 + 32 * 12 * 4
    mesh = sent("mesh", 4, 2).step
    assert mesh["reconstructions"] == 16 * 12 * 4 and mesh["gradients"] == 4 * 284 and mesh["batch"] == 8 * 96
    fsdp = sent("fsdp", 2, 1)
    assert fsdp.torch == {"parameters gathered": 4 * 278, "gradients scattered": 2 * 4 * 278}
    assert fsdp.step == {"firings": 4 * 33, "figures": figures}


IMPOSSIBLE: list[tuple[dict[str, Any], str, int, int, str]] = [
    ({}, "single", 2, 0, "2 ranks"),
    ({}, "ddp", 3, 0, "no multiple of 3 ranks"),
    ({}, "mesh", 4, 3, "no multiple of feature_ranks 3"),
    ({}, "mesh", 4, 4, "ddp or features"),
    ({}, "mesh", 4, 1, "ddp or features"),
    ({}, "mesh", 2, 0, "groups of several"),
    ({"optimizer__name": "muon"}, "features", 2, 0, "optimizer muon"),
    ({"optimizer__name": "adam8bit"}, "mesh", 4, 0, "optimizer adam8bit"),
    ({"optimizer__name": "muon"}, "fsdp", 2, 0, "optimizer muon"),
    ({"optimizer__name": "schedule_free"}, "fsdp", 2, 0, "optimizer schedule_free"),
    ({"optimizer__precision": "bf16"}, "fsdp", 2, 0, "precision bf16"),
    ({"optimizer__precision": "fp16"}, "features", 2, 0, "precision fp16"),
    ({"nonlinearity": NonlinearityConfig("math:floor")}, "features", 2, 0, "nonlinearity math:floor"),
    ({"loss__own": TermConfig(1.0, term="math:floor")}, "mesh", 4, 2, "term math:floor"),
    # chunks of 3: 3, 3, 3, 3, 3, 1 and nothing for the others
    ({}, "features", 8, 0, ""),
    ({"n_features": 10, "init__l0": 2.0}, "features", 8, 0, "without any"),
    ({"nonlinearity": NonlinearityConfig("groupmax", k=4.0), "n_features": 24}, "features", 8, 0, "groups of 6"),
    ({"nonlinearity": NonlinearityConfig("groupmax", k=8.0)}, "features", 8, 0, ""),
    (
        {"n_features": 14, "architecture": ArchitectureConfig(topology="molt", ranks=(3, 2, 1))},
        "features",
        2,
        0,
        "tran",
    ),
    ({"n_features": 14, "architecture": ArchitectureConfig(topology="molt", ranks=(3, 2, 1))}, "ddp", 2, 0, ""),
    (
        {"architecture": ArchitectureConfig(topology="crosscoder", models=2, shared=4)},
        "features",
        2,
        0,
        "models share",
    ),
    ({"optimizer__micro_batches": 3}, "single", 1, 0, "micro_batches 3"),
    ({"optimizer__micro_batches": 32}, "ddp", 2, 0, "micro_batches 32"),
    ({"optimizer__micro_batches": 32}, "features", 2, 0, ""),
    ({"loss__kl": TermConfig(1.0)}, "features", 2, 0, ""),
    ({"loss__kl": TermConfig(1.0)}, "fsdp", 2, 0, ""),
]


@pytest.mark.parametrize(("changes", "strategy", "ranks", "sharing", "reason"), IMPOSSIBLE)
def test_refusals(changes: dict[str, Any], strategy: str, ranks: int, sharing: int, reason: str):
    found = impossible(tiny(**changes), strategy, ranks, sharing)
    assert reason in found and bool(found) == bool(reason)


def test_one_rank_is_single():
    assert propose(tiny(), SHAPE, 1, PLENTY).strategy == "single"


def test_little_to_send_is_sent_as_gradients():
    assert propose(tiny(), SHAPE, 2, PLENTY).strategy == "ddp"


LARGE, WIDE = tiny(n_features=8192, batch_tokens=64, tokens=640, init__l0=512.0), Shape(4, 256)
"""Gradients of 117 MB, in all."""


def test_of_what_fits_the_least_is_sent():
    found = estimates(LARGE, WIDE, 8, PLENTY)
    assert found[1].strategy == "ddp" and found[1].payload.most > SMALL_WIRE
    chosen = propose(LARGE, WIDE, 8, PLENTY)
    assert chosen.payload.most == min(each.payload.most for each in found if not each.impossible)


def test_what_does_not_fit_is_not_chosen():
    by_total = sorted(
        (each for each in estimates(LARGE, WIDE, 4, PLENTY) if not each.impossible), key=lambda e: e.total
    )
    least = propose(LARGE, WIDE, 4, by_total[0].total)
    assert least.fits and least.division == by_total[0].division
    nothing = propose(LARGE, WIDE, 4, by_total[0].total - 1)
    assert not nothing.fits and nothing.division == by_total[0].division


def test_only_the_feature_ranks_that_are_configured():
    cfg = dataclasses.replace(LARGE, parallel=ParallelConfig("mesh", feature_ranks=4))
    assert [each.feature_ranks for each in divisions(cfg, 8) if each.strategy == "mesh"] == [4]


def test_nothing_possible_is_an_error_with_all_reasons():
    with pytest.raises(ConfigError) as caught:
        propose(tiny(), SHAPE, 3, PLENTY)
    assert all(f"{strategy}: " in str(caught.value) for strategy in STRATEGIES)


@settings(max_examples=20, deadline=None)
@given(
    n_features=st.integers(1, 80).map(lambda n: 8 * n),
    batch=st.integers(1, 8).map(lambda n: 48 * n),
    name=st.sampled_from(["jumprelu", "topk", "batch_topk_all", "relu"]),
    optimizer=st.sampled_from(["adam", "adamw", "schedule_free"]),
    device=st.sampled_from(["cpu", "cuda"]),
    micro=st.sampled_from([1, 2, 3]),
)
def test_more_ranks_need_no_more_each(n_features: int, batch: int, name: str, optimizer: str, device: Any, micro: int):
    cfg = tiny(
        n_features=n_features,
        batch_tokens=batch,
        tokens=10 * batch,
        pool_tokens=batch,
        nonlinearity=NonlinearityConfig(name, k=0.0 if name in ("jumprelu", "relu") else 4.0),
        optimizer__name=optimizer,
        optimizer__micro_batches=micro,
        init__encoder_bias="zero",
        init__l0=2.0,
    )
    totals = []
    for ranks in (2, 3, 4, 8, 48):
        found = [each for each in estimates(cfg, SHAPE, ranks, PLENTY, Situation(device)) if not each.impossible]
        totals += [each.total for each in found if each.strategy == "features"]
        limits = {each.total for each in found}
        for limit in limits:
            chosen = propose(cfg, SHAPE, ranks, limit, Situation(device))
            assert chosen.fits and not chosen.impossible and chosen.total <= limit
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("products", ["auto", "sparse", "dense"])
def test_what_is_needed_when_more_features_fire(products: str):
    """Without a k that bounds them: as few places at first, in auto all places later."""
    options: dict[str, Any] = {"n_features": 1024, "batch_tokens": 256, "tokens": 256, "pool_tokens": 256}
    cfg = tiny(products=products, init__l0=16.0, loss__l1=TermConfig(1.0), **options)
    cfg = dataclasses.replace(cfg, nonlinearity=NonlinearityConfig("jumprelu", bandwidth=0.01))
    census = count(cfg, SHAPE)

    def at(*, grows: bool, device: str = "cpu") -> Memory:
        return memory(cfg, SHAPE, census, Division("single"), device=device, dead=0.0, grows=grows)

    start, most = at(grows=False), at(grows=True)
    assert (start.dense, most.dense) == (products == "dense", products != "sparse")
    assert start.share < 0.03 and (most.share > 0.12 or products == "dense")
    assert most.peak > start.peak or products == "dense"
    assert at(grows=True, device="cuda").dense == (products != "sparse")
    few = dataclasses.replace(cfg, nonlinearity=NonlinearityConfig("topk", k=16.0), loss={"l1": TermConfig(1.0)})
    planned = memory(few, SHAPE, count(few, SHAPE), Division("single"), device="cpu", dead=0.0)
    assert planned.dense == (products == "dense") and planned.share == 16 / 1024


class Live(TorchDispatchMode):
    """The most bytes that tensors made meanwhile had at a time; those that were there before do not count."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._here: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._here and key not in self._before:
            self._here[key] = storage.nbytes()
            weakref.finalize(storage, self._here.pop, key, None)
        self.most = max(self.most, sum(self._here.values()))


TERMS = {
    "tanh_sparsity": TermConfig(0.1, scale=1.0),
    "l1": TermConfig(0.1),
    "quadratic_l0": TermConfig(0.1, target=4.0),
    "frequency": TermConfig(0.1, scale=0.1),
    "pre_activation": TermConfig(1e-3),
    "auxiliary": TermConfig(0.03, k=4),
}
N, T, N_LAYERS, WIDTH = 2048, 256, 4, 128
ACTIVE = 32.0
BY_K = ("topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax")
PASSES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    *[(name, (), {}) for name in ("jumprelu", "relu", *BY_K)],
    *[("jumprelu", (term,), {}) for term in TERMS],
    ("jumprelu", tuple(TERMS), {}),
    ("topk", ("auxiliary",), {}),
    ("topk", ("pre_activation",), {}),
    ("jumprelu", (), {"architecture": ArchitectureConfig(prefixes=(512, 2048))}),
    ("jumprelu", (), {"architecture": ArchitectureConfig(decoder="target")}),
    ("jumprelu", ("tanh_sparsity",), {"architecture": ArchitectureConfig(topology="crosscoder")}),
    ("jumprelu", ("tanh_sparsity",), {"optimizer__precision": "bf16_autocast"}),
]


def named(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(str(getattr(part, "decoder", part)) for part in value.values())
    return value if isinstance(value, str) else "+".join(value)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("many", [False, True], ids=["parameters", "places"])
@pytest.mark.parametrize(("name", "terms", "changes"), PASSES, ids=named)
def test_what_autograd_keeps(
    name: str,
    terms: tuple[str, ...],
    changes: dict[str, Any],
    many: bool,
    dense: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """Where decoders are most of it, and where places are. What a kernel itself copies is not seen."""
    monkeypatch.setattr(activations, "_KTHVALUE", 0)
    rows, width = (512, 8) if many else (T, WIDTH)
    active = ACTIVE * 4 if many and not dense else ACTIVE
    cfg = tiny(
        n_features=N,
        batch_tokens=rows,
        pool_tokens=rows,
        tokens=rows,
        warmup_tokens=0,
        decay_share=0.0,
        nonlinearity=NonlinearityConfig(name, bandwidth=0.01, k=active if name in BY_K else 0.0),
        products="dense" if dense else "auto",
        loss={"reconstruction": TermConfig(1.0), **{term: TERMS[term] for term in terms}},
        init__l0=active,
        **changes,
    )
    coder = Transcoder(N_LAYERS, N, width, cfg.architecture)
    init.uniform(coder, generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(2, rows, N_LAYERS, width, generator=torch.Generator().manual_seed(1))
    coder.log_threshold.requires_grad_(name == "jumprelu")
    with torch.no_grad():
        coder.log_threshold.fill_(math.log(cfg.init.threshold) if name == "jumprelu" else -math.inf)
    if name in ("jumprelu", "relu"):
        init.encoder_bias_for_rate(coder, x, rate=active / N)
    dead = torch.full(coder.b_enc.shape, "auxiliary" in terms)
    moment = Moment(rows, dead, torch.full(coder.b_enc.shape, 0.1), int(dead.sum()))
    with Live([*coder.parameters(), x, y]) as live:
        with precision.products(cfg.optimizer.precision, x.device):
            result = evaluate_batch(coder, x, y, cfg, moment)
        forward, live.most = live.most, 0
        result.loss.backward()
    shape = Shape(N_LAYERS, width)
    revived = float(dead.any())
    found = memory(cfg, shape, count(cfg, shape), Division("single"), device="cpu", dead=revived, grows=False)
    base = found.weights + found.optimizer + found.batch
    assert found.dense == dense
    assert 0.9 < (found.moments["forward"] - base) / forward < 1.2
    assert 0.9 < (found.moments["backward"] - base) / live.most < 1.2
