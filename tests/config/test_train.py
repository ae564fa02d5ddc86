"""Options of stage train that make no sense are refused before any job, with the dotted key and the reason."""

import pytest
import yaml
from tests.core.coders import REPOSITORY, plain_options

from circuitmill.config.decode import decode
from circuitmill.config.names import is_import_path, require_known
from circuitmill.config.train import END_TO_END, TERMS, TOP_K, TrainConfig
from circuitmill.errors import ConfigError

TANH = {"coefficient": 1.0, "scale": 1.0}
MODELS = {"architecture__topology": "crosscoder", "architecture__models": 2}
MOLT = {"architecture__topology": "molt", "architecture__ranks": [2, 1], "n_features": 1023}
TOPK = {"nonlinearity__name": "topk", "nonlinearity__k": 8}
PLAIN_LOSS = {"reconstruction": {"coefficient": 1.0}}


def decoded(**changes: object) -> TrainConfig:
    return decode(TrainConfig, plain_options(**changes), "train")


def refused(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        decoded(**changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        # numbers
        ({"n_features": 0}, "n_features", "a number above 0, found 0"),
        ({"lr": float("nan")}, "lr", "a number above 0, found nan"),
        ({"dead_tokens": -1}, "dead_tokens", "a number above 0, found -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints", "a number above 0"),
        ({"stop_l0": -1.0}, "stop_l0", "a number of at least 0"),
        ({"checkpoint_l0": [5.0, 0.0]}, "checkpoint_l0", "numbers above 0"),
        ({"decay_share": 1.5}, "decay_share", "a share from 0 to 1"),
        ({"batch_tokens": 5_000_000}, "batch_tokens", "at most tokens (2800000)"),
        ({"batch_tokens": 200_000}, "batch_tokens", "at most pool_tokens (131072)"),
        ({"warmup_tokens": 2_700_000}, "warmup_tokens", "at most what the decay leaves of tokens"),
        ({"init__threshold": 0.0}, "init.threshold", "a number above 0"),
        ({"init__l0": 1024.0}, "init.l0", "fewer than n_features (1024)"),
        ({"init__l0": 0.4}, "init.l0", "a share of n_features (1024) that batch_tokens (1024) can show"),
        ({"init__l0": 1023.9}, "init.l0", "a share of n_features (1024) that batch_tokens (1024) can show"),
        # architecture
        (
            {"architecture__topology": "sae", "architecture__skip": True},
            "architecture.skip",
            "topology sae: a linear map",
        ),
        (
            {"architecture__topology": "crosscoder", "architecture__skip": True},
            "architecture.skip",
            "topology crosscoder: a linear map onto its own input would leave nothing to learn",
        ),
        (
            MOLT | {"architecture__decoder": "target"},
            "architecture.decoder",
            "untied with topology molt, which has one",
        ),
        ({"architecture__topology": "plt", "architecture__decoder": "source"}, "architecture.decoder", "topology plt"),
        ({"architecture__topology": "sae", "architecture__decoder": "target"}, "architecture.decoder", "topology sae"),
        ({"architecture__decoder": "low_rank"}, "architecture.rank", "a rank above 0 with decoder low_rank"),
        ({"architecture__rank": 4}, "architecture.rank", "and 0 with the others, found 4"),
        ({"architecture__pair_scale": True}, "architecture.pair_scale", "false, except with decoder target or source"),
        (
            {"architecture__pair_offset": True},
            "architecture.pair_offset",
            "false, except with decoder target or source",
        ),
        ({"architecture__topology": "molt"}, "architecture.ranks", "ranks with topology molt"),
        ({"architecture__ranks": [2]}, "architecture.ranks", "none with the others"),
        (MOLT | {"architecture__ranks": [1, 2]}, "architecture.ranks", "positive ranks, decreasing"),
        (MOLT | {"architecture__ranks": [1, 0]}, "architecture.ranks", "positive ranks, decreasing"),
        (MOLT | {"n_features": 1024}, "architecture.ranks", "a multiple of 3"),
        ({"architecture__models": 2}, "architecture.models", "1, or more with topology crosscoder"),
        (MODELS | {"architecture__models": 0}, "architecture.models", "1, or more with topology crosscoder"),
        ({"architecture__shared": 4}, "architecture.shared", "except with a crosscoder over several models"),
        (
            {"architecture__topology": "crosscoder", "architecture__shared": 4},
            "architecture.shared",
            "except with a crosscoder over several models",
        ),
        (MODELS | {"architecture__shared": -1}, "architecture.shared", "a number of at least 0"),
        (MODELS | {"architecture__shared": 1025}, "architecture.shared", "at most n_features (1024)"),
        ({"architecture__prefixes": [64, 64, 1024]}, "architecture.prefixes", "positive numbers, increasing"),
        ({"architecture__prefixes": [256, 64, 1024]}, "architecture.prefixes", "positive numbers, increasing"),
        ({"architecture__prefixes": [0, 1024]}, "architecture.prefixes", "positive numbers, increasing"),
        ({"architecture__prefixes": [64, 512]}, "architecture.prefixes", "n_features (1024) as the last"),
        # scaling and starting values
        (MOLT | {"scaling": "standardize"}, "scaling", "rms with topology molt, found standardize"),
        (
            {"architecture__decoder": "source", "scaling": "standardize"},
            "scaling",
            "rms with a decoder shared by targets",
        ),
        (
            {"init__identical_models": True},
            "init.identical_models",
            "false, except with a crosscoder over several models",
        ),
        (MOLT | {"init__weights": "transpose"}, "init.weights", "uniform with topology molt"),
        (
            {"architecture__decoder": "target", "architecture__pair_offset": True, "init__weights": "january_2025"},
            "init.weights",
            "uniform with topology molt or pair_offset: features have no decoder vectors to transpose",
        ),
        ({"adapter_rank": 8}, "adapter_rank", "0 without a base to adapt"),
        (MOLT | {"base": "other", "adapter_rank": 8}, "adapter_rank", "features have no decoder vectors to change"),
        ({"base": "other", "adapter_rank": -1}, "adapter_rank", "a number of at least 0"),
        # nonlinearity
        ({"nonlinearity__name": "jumprellu"}, "nonlinearity.name", "found 'jumprellu' (nearest: jumprelu)"),
        ({"nonlinearity__name": "not.installed:f"}, "nonlinearity.name", "`module:function` of an installed module"),
        ({"nonlinearity__bandwidth": 0.0}, "nonlinearity.bandwidth", "a number above 0"),
        ({"nonlinearity__k": 8.0}, "nonlinearity.k", "0 with jumprelu, which keeps no given number"),
        ({"nonlinearity__k_start": 8.0}, "nonlinearity.k_start", "0 with jumprelu"),
        (TOPK | {"nonlinearity__k": 0.0}, "nonlinearity.k", "a k above 0 with topk"),
        (TOPK | {"nonlinearity__k": 1025}, "nonlinearity.k", "0 to n_features (1024), found 1025"),
        (TOPK | {"nonlinearity__k": -1}, "nonlinearity.k", "0 to n_features (1024)"),
        (TOPK | {"nonlinearity__k": 7.5}, "nonlinearity.k", "a whole number, which every token keeps, found 7.5"),
        (
            TOPK | {"nonlinearity__k_start": 4, "nonlinearity__k_ramp_share": 0.5},
            "nonlinearity.k_start",
            "at least k (8)",
        ),
        (TOPK | {"nonlinearity__k_start": 64}, "nonlinearity.k_ramp_share", "above 0 with a k_start"),
        (TOPK | {"nonlinearity__k_ramp_share": 0.5}, "nonlinearity.k_ramp_share", "0 without, found 0.5"),
        (TOPK | {"nonlinearity__k_ramp_share": 1.5}, "nonlinearity.k_ramp_share", "a share from 0 to 1"),
        (TOPK | {"nonlinearity__threshold_rate": 2.0}, "nonlinearity.threshold_rate", "a share from 0 to 1"),
        (TOPK | {"nonlinearity__calibration_tokens": 0}, "nonlinearity.calibration_tokens", "a number above 0"),
        (
            TOPK | {"nonlinearity__name": "groupmax", "nonlinearity__k": 7},
            "nonlinearity.k",
            "divisor of n_features (1024)",
        ),
        (TOPK | {"nonlinearity__name": "groupmax", "nonlinearity__k": 0.5}, "nonlinearity.k", "a constant divisor"),
        # loss
        ({"loss": {}}, "loss", "at least one term with a coefficient above 0"),
        ({"loss": {"reconstruction": {"coefficient": 0.0}}}, "loss", "at least one term with a coefficient above 0"),
        ({"loss__reconstructoin": {"coefficient": 1.0}}, "loss.reconstructoin", "nearest: reconstruction"),
        ({"loss__mine": {"coefficient": 1.0, "term": "tanh"}}, "loss.mine.term", "nearest: tanh_sparsity"),
        ({"loss__l1": {"coefficient": -1.0}}, "loss.l1.coefficient", "a number of at least 0, found -1.0"),
        ({"loss__l1": {"coefficient": 1.0, "ramp_share": 2.0}}, "loss.l1.ramp_share", "a share from 0 to 1"),
        ({"loss__l1": {"coefficient": 1.0, "scale": 2.0}}, "loss.l1.scale", "of term l1, which takes norm, features"),
        ({"loss__reconstruction__k": 3}, "loss.reconstruction.k", "of term reconstruction, which takes none"),
        ({"loss__tanh_sparsity": {"coefficient": 1.0}}, "loss.tanh_sparsity.scale", "a number above 0, found None"),
        ({"loss__tanh_sparsity__scale": 0.0}, "loss.tanh_sparsity.scale", "a number above 0, found 0.0"),
        ({"loss__quadratic_l0": {"coefficient": 1.0}}, "loss.quadratic_l0.target", "a number above 0, found None"),
        ({"loss__auxiliary__k": 0}, "loss.auxiliary.k", "a number above 0, found 0"),
        (
            {"loss__tanh_sparsity__features": "shared"},
            "loss.tanh_sparsity.features",
            "unless architecture.shared is above 0",
        ),
        (
            {"loss__quadratic_l0": {"coefficient": 1.0, "target": 8.0}, "nonlinearity__name": "relu"},
            "nonlinearity.name",
            "jumprelu with quadratic_l0, whose gradient is by the threshold, found relu",
        ),
        (
            TOPK | {"loss__mine": {"coefficient": 1.0, "scale": 0.1, "term": "frequency"}},
            "nonlinearity.name",
            "jumprelu with frequency",
        ),
        # optimizer and monitor
        ({"optimizer__beta1": 1.0}, "optimizer.beta1", "a number from 0 to below 1"),
        ({"optimizer__eps": 0.0}, "optimizer.eps", "a number above 0"),
        ({"optimizer__clip_norm": 0.0}, "optimizer.clip_norm", "a number above 0"),
        ({"optimizer__micro_batches": 0}, "optimizer.micro_batches", "a number above 0"),
        ({"optimizer__weight_decay": 0.1}, "optimizer.weight_decay", "0 with adam, found 0.1"),
        (
            {"optimizer__weight_decay": -0.1, "optimizer__name": "adamw"},
            "optimizer.weight_decay",
            "a number of at least 0, found -0.1",
        ),
        ({"optimizer__moments": "bf16", "optimizer__name": "muon"}, "optimizer.moments", "float32 with muon"),
        ({"optimizer__lazy": True, "optimizer__name": "adam8bit"}, "optimizer.lazy", "false with adam8bit"),
        (
            {"optimizer__lazy": True, "optimizer__beta1": 0.95, "optimizer__beta2": 0.9},
            "optimizer.beta1",
            "a number below the root of beta2 (0.9) with lazy",
        ),
        ({"monitor__log_tokens": 0}, "monitor.log_tokens", "a number above 0"),
        ({"monitor__heldout_every_tokens": 0}, "monitor.heldout_every_tokens", "a number above 0"),
        ({"monitor__heldout_tokens": -1}, "monitor.heldout_tokens", "a number of at least 0"),
        # wrong types are left to the decoder
        ({"nonlinearity__pass_through": 1}, "nonlinearity.pass_through", "bool, found 1 (int)"),
        ({"architecture__topology": "ctl"}, "architecture.topology", "(nearest: clt), found 'ctl'"),
        ({"nonlinearity__bandwith": 1.0}, "nonlinearity.bandwith", "nearest valid key: train.nonlinearity.bandwidth"),
    ],
)
def test_nonsense_is_refused_with_key_and_reason(changes, key, reason):
    text = refused(**changes)
    problems = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert any(line.startswith(f"train.{key}: expected ") and reason in line for line in problems), text
    assert f"\n  where: train.{key}" in text


@pytest.mark.parametrize("term", END_TO_END)
@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        ("sae", "topology sae writes what it reads, not what MLPs write"),
        ("crosscoder", "topology crosscoder writes what it reads"),
        ("acausal", "topology acausal writes to layers that run before those it reads"),
    ],
)
def test_terms_that_need_the_language_model_need_a_transcoder_it_can_run_with(term, topology, reason):
    text = refused(architecture__topology=topology, loss=PLAIN_LOSS | {term: {"coefficient": 1.0}})
    assert f"train.loss: expected no cross_entropy or kl: {reason}" in text
    assert decoded(architecture__topology=topology, loss=PLAIN_LOSS | {term: {"coefficient": 0.0}})
    for possible in ("clt", "plt"):
        assert decoded(architecture__topology=possible, loss=PLAIN_LOSS | {term: {"coefficient": 1.0}}).end_to_end


def test_problems_of_different_parts_are_reported_together():
    text = refused(architecture__skip=True, architecture__topology="sae", optimizer__eps=0.0, monitor__log_tokens=0)
    assert "3 problem(s)" in text
    for key in ("train.architecture.skip", "train.optimizer.eps", "train.monitor.log_tokens"):
        assert f"{key}: expected" in text


SENSE = {
    "the default": {},
    "relu": {"nonlinearity__name": "relu", "loss": PLAIN_LOSS | {"l1": {"coefficient": 1.0, "norm": "summed"}}},
    "topk that falls": TOPK | {"nonlinearity__k_start": 64, "nonlinearity__k_ramp_share": 0.5},
    "a fraction of a batch": TOPK | {"nonlinearity__name": "batch_topk_all", "nonlinearity__k": 16.667},
    "groups": TOPK | {"nonlinearity__name": "groupmax", "nonlinearity__k": 64},
    "matryoshka": {"architecture__prefixes": [64, 256, 1024]},
    "molt": MOLT,
    "molt with a skip connection and prefixes": MOLT
    | {"architecture__skip": True, "architecture__prefixes": [3, 1023]},
    "models": MODELS
    | {
        "architecture__shared": 128,
        "init__identical_models": True,
        "loss__tanh_sparsity": TANH | {"features": "exclusive", "norm": "summed"},
        "loss__shared": TANH | {"features": "shared", "norm": "summed", "term": "tanh_sparsity"},
    },
    "low rank, standardized": {"architecture__decoder": "low_rank", "architecture__rank": 8, "scaling": "standardize"},
    "shared by sources": {
        "architecture__decoder": "target",
        "architecture__pair_scale": True,
        "scaling": "standardize",
    },
    "an adapter": {"base": "run/clt", "adapter_rank": 4},
    "own functions": {
        "nonlinearity__name": "tests.core.plugins:above_half",
        "nonlinearity__k": 3.5,
        "loss": PLAIN_LOSS | {"tests.core.plugins:squared_activations": {"coefficient": 1.0, "scale": 3.0, "k": 2}},
    },
    "a quadratic penalty": {"loss__quadratic_l0": {"coefficient": 1.0, "target": 8.0}},
    "a term that is off": {"nonlinearity__name": "relu", "loss__quadratic_l0": {"coefficient": 0.0, "target": 8.0}},
    "no rate to start with": {"init__encoder_bias": "zero", "init__l0": 0.4},
}


@pytest.mark.parametrize("name", SENSE)
def test_sense_is_taken(name):
    assert isinstance(decoded(**SENSE[name]), TrainConfig)


def test_only_terms_with_a_coefficient_are_active():
    cfg = decoded(loss=PLAIN_LOSS | {"l1": {"coefficient": 0.0}, "mine": {"coefficient": 2.0, "term": "l1"}})
    assert list(cfg.active_terms()) == ["reconstruction", "mine"]
    assert cfg.active_kinds() == {"reconstruction", "l1"} and not cfg.end_to_end


def test_every_option_of_a_term_is_one_of_its_keys():
    keys = {"scale", "norm", "features", "target", "k", "balance"}
    assert set().union(*TERMS.values()) == keys
    for name, allowed in TERMS.items():
        for key in keys - set(allowed):
            value = {"norm": "summed", "features": "all", "k": 3, "balance": True}.get(key, 1.0)
            given = {"scale": 1.0, "target": 1.0, "k": 3}
            options = {"coefficient": 0.0} | {own: given[own] for own in allowed if own in given} | {key: value}
            assert f"train.loss.{name}.{key}: expected no such option" in refused(loss=PLAIN_LOSS | {name: options})


def test_the_smallest_k_and_the_largest():
    for name in TOP_K:
        for k in (1.0, 1024.0):
            assert decoded(**TOPK | {"nonlinearity__name": name, "nonlinearity__k": k}).nonlinearity.k == k


def test_default_lists_every_key():
    data = yaml.safe_load((REPOSITORY / "config/train/default.yaml").read_text())
    cfg = decode(TrainConfig, data, "train")
    for part, own in (
        (cfg, data),
        *((getattr(cfg, name), data[name]) for name in data if isinstance(data[name], dict)),
    ):
        if not isinstance(part, dict):
            assert set(own) == set(vars(part))


def test_names_of_functions():
    assert is_import_path("package.module:function")
    for name in ("relu", "package.module", "package:", ":function", "a:b:c", "a-b:c", "a:b.c"):
        assert not is_import_path(name)
    require_known("math:sqrt", ["relu"], "key")
    require_known("relu", ["relu"], "key")
    for name in ("missing_package.module:f", "math.inner:f", "math..inner:f", "reluu", ""):
        with pytest.raises(
            ConfigError, match=r"one of relu, or `module:function`.*\n  where: key\n  fix:   nearest: relu"
        ):
            require_known(name, ["relu"], "key")
