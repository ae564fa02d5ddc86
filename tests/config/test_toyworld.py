import pytest
from tests.toyworld.conftest import load_config, replace

from circuitmill.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"documents": 0}}, r"positive number; found 0\n.*toyworld.corpus.documents"),
        ({"corpus": {"mix": {}}}, r"shares of at least 0; found {}\n.*toyworld.corpus.mix"),
        ({"corpus": {"mix": {"two_hop": -1.0}}}, r"shares of at least 0"),
        ({"transformer": {"d_model": 30}}, r"multiple of twice n_heads \(4\); found 30"),
        ({"transformer": {"attention": "LGG"}}, r"2 letters L or G; found LGG\n.*toyworld.transformer.attention"),
        ({"transformer": {"attention": "LX"}}, r"2 letters L or G; found LX"),
        ({"pretrain": {"batch_tokens": 500}}, r"multiple of the context \(32\); found 500"),
        ({"pretrain": {"tokens": 100}}, r"at least one batch \(512 tokens\); found 100\n.*toyworld.pretrain.tokens"),
        ({"pretrain": {"decay_from": 1.5}}, r"share from 0 to 1; found 1.5"),
        ({"pretrain": {"extensions": -1}}, r"at least 0; found -1\n.*toyworld.pretrain.extensions"),
        ({"pretrain": {"extension_tokens": 100}}, r"at least one batch \(512 tokens\); found 100\n.*extension_tokens"),
        ({"pretrain": {"extension_rate": 1.5}}, r"share from 0 to 1; found 1.5\n.*toyworld.pretrain.extension_rate"),
    ],
)
def test_values_that_make_no_sense(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(load_config("tiny"), **changes)


@pytest.mark.parametrize("option", ["default", "tiny"])
def test_shipped_files_decode(option: str):
    cfg = load_config(option)
    assert sum(cfg.corpus.mix.values()) == pytest.approx(1)
