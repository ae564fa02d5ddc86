"""Options of stages calibrate and cache."""

import dataclasses

import pytest
import yaml
from tests.conftest import REPOSITORY

from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.compose import compose
from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError

CLASSES = {"cache": CacheConfig, "calibrate": CalibrateConfig}
MODEL = {"source": "folder", "name": "somewhere", "revision": "", "dtype": "float32"}


def plain(stage: str, option: str = "tiny") -> dict:
    """An option file, in which calibrate follows cache."""
    followed = {"hookpoint": "mlp", "layers": None, "second_model": None}
    data = yaml.safe_load((REPOSITORY / "config" / stage / f"{option}.yaml").read_text())
    return data | followed | {"model": MODEL}


def load(stage: str, **changes: object) -> CacheConfig | CalibrateConfig:
    return decode(CLASSES[stage], plain(stage) | changes, stage)


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        *(("cache", key, 0) for key in ("train_shards", "heldout_shards", "batch_sequences", "group_channels")),
        *(("cache", key, -1) for key in ("chunk_bytes", "chunks_per_file", "train_tokens", "heldout_tokens")),
        *(("cache", "compression_level", level) for level in (-1, 23)),
        *(("cache", "bits", bits) for bits in (0.9, 7.5)),
        *(("calibrate", key, 0) for key in ("tokens", "sample_tokens", "batch_sequences")),
    ],
)
def test_values_out_of_range_name_their_key(stage: str, key: str, value: float) -> None:
    for make in (lambda: load(stage, **{key: value}), lambda: dataclasses.replace(load(stage), **{key: value})):
        with pytest.raises(ConfigError) as caught:
            make()
        assert f"{stage}.{key}" in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize("key", ["mode", "targets", "codec", "hookpoint"])
def test_choices_are_named_with_the_nearest(key: str) -> None:
    wrong = {"mode": "steam", "targets": "recompute", "codec": "int16", "hookpoint": "resid_pos"}[key]
    right = {"mode": "stream", "targets": "recomputed", "codec": "int", "hookpoint": "resid_post"}[key]
    with pytest.raises(ConfigError, match=rf"cache\.{key}: expected one of .*nearest: {right}"):
        load("cache", **{key: wrong})


@pytest.mark.parametrize("codec", ["float32", "bf16", "int8", "int4", "int2", "entropy"])
def test_every_codec_can_be_chosen(codec: str) -> None:
    assert load("cache", codec=codec).codec == codec


@pytest.mark.parametrize("value", [1, 4, 7.0, 3.25])
def test_bits_may_be_broken(value: float) -> None:
    assert load("cache", bits=value).bits == float(value)


SECOND = MODEL | {"name": "elsewhere"}


@pytest.mark.parametrize("hookpoint", ["mlp_in", "mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post"])
def test_other_hookpoints_are_of_inputs_alone(hookpoint: str) -> None:
    cfg = load("cache", hookpoint=hookpoint, targets="inputs", layers=[0, 3], second_model=SECOND)
    assert (cfg.hookpoint, cfg.layers, cfg.second_model.name) == (hookpoint, (0, 3), "elsewhere")
    for targets in ("stored", "recomputed"):
        with pytest.raises(
            ConfigError, match=rf"cache\.targets: expected inputs with hookpoint {hookpoint}.*'{targets}'"
        ):
            load("cache", hookpoint=hookpoint, targets=targets)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("cache.targets", {"hookpoint": "mlp", "targets": "inputs"}),
        *((f"{stage}.layers", {"hookpoint": "mlp", "layers": [0]}) for stage in CLASSES),
        *((f"{stage}.second_model", {"hookpoint": "mlp", "second_model": SECOND}) for stage in CLASSES),
        *((f"{stage}.layers", {"layers": layers}) for stage in CLASSES for layers in ([], [1, 0], [2, 2], [-1, 0])),
        *((f"{stage}.second_model", {"second_model": MODEL}) for stage in CLASSES),
        *(
            (f"{stage}.second_model.source", {"second_model": MODEL | {"source": "toyworld", "name": "toyworld-early"}})
            for stage in CLASSES
        ),
    ],
)
def test_choices_that_do_not_go_together_name_their_key(key: str, changes: dict) -> None:
    stage = key.split(".")[0]
    more = {"targets": "inputs"} if stage == "cache" else {}
    with pytest.raises(ConfigError) as caught:
        load(stage, **({"hookpoint": "resid_post"} | more | changes))
    assert f"{key}: expected" in str(caught.value)


def test_calibrate_follows_cache() -> None:
    tree = compose(["experiment=tiny", "cache=two_models", "cache.layers=[1]"])
    cached, calibrated = (decode(CLASSES[stage], tree[stage], stage) for stage in CLASSES)
    for cfg in (cached, calibrated):
        assert (cfg.hookpoint, cfg.layers) == ("resid_post", (1,))
        assert (cfg.model.name, cfg.second_model.name) == ("toyworld", "toyworld-early")
    assert decode(CacheConfig, compose(["cache=resid_post"])["cache"], "cache").second_model is None
    other = compose(
        ["cache=resid_post", "model=gpt2", "+model@cache.second_model=gpt2", "cache.second_model.revision=x"]
    )
    assert decode(CalibrateConfig, other["calibrate"], "calibrate").second_model.revision == "x"


def test_streaming_has_no_shards() -> None:
    assert load("cache", mode="stream").units() == ()
    assert load("cache", train_shards=2, heldout_shards=2).units() == (
        "train-00000",
        "train-00001",
        "heldout-00000",
        "heldout-00001",
    )


def test_shards_share_the_sequences_of_the_budget() -> None:
    cfg = load("cache", train_shards=3, heldout_shards=1, train_tokens=1000, heldout_tokens=None)
    slices = cfg.slices({"train": 80, "heldout": 9}, 32)
    assert slices == {
        "train-00000": ("train", 0, 10),
        "train-00001": ("train", 10, 21),
        "train-00002": ("train", 21, 32),
        "heldout-00000": ("heldout", 0, 9),
    }
    assert cfg.n_sequences("train", 80, 32) == 32 and cfg.n_sequences("heldout", 9, 32) == 9
    with pytest.raises(ConfigError, match=r"at most 992 tokens in split train(.|\n)*found a budget of 1000"):
        cfg.n_sequences("train", 31, 32)
    with pytest.raises(ConfigError, match=r"at most 2 shards for 2 sequences(.|\n)*cache\.train_shards"):
        cfg.slices({"train": 2, "heldout": 9}, 500)


@pytest.mark.parametrize("stage", ["cache", "calibrate"])
def test_the_shipped_options_say_the_same_of_every_key(stage: str) -> None:
    """The tiny option differs in size alone: what it tests is what runs."""
    tiny, default = plain(stage), plain(stage, "default")
    assert list(tiny) == list(default)
    sizes = {"train_shards", "train_tokens", "heldout_tokens", "batch_sequences", "tokens", "sample_tokens"}
    assert {key for key in tiny if tiny[key] != default[key]} <= sizes
