"""The world, the text and the tokenizer of the shipped configurations."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from tests.conftest import REPOSITORY
from transformers import PreTrainedTokenizerFast

from circuitmill.config.decode import decode
from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.toyworld.corpus import split_documents, write_documents
from circuitmill.toyworld.tokenizer import make_tokenizer
from circuitmill.toyworld.world import World, make_world


def load_config(option: str) -> ToyworldConfig:
    path = Path(REPOSITORY, "config", "toyworld", f"{option}.yaml")
    return decode(ToyworldConfig, yaml.safe_load(path.read_text()), "toyworld")


@pytest.fixture(scope="session")
def default_cfg() -> ToyworldConfig:
    return load_config("default")


@pytest.fixture(scope="session")
def tiny_cfg() -> ToyworldConfig:
    return load_config("tiny")


@pytest.fixture(scope="session")
def world(default_cfg: ToyworldConfig) -> World:
    return make_world(default_cfg.seed)


@pytest.fixture(scope="session")
def documents(world: World, default_cfg: ToyworldConfig) -> list[str]:
    """Everything that the demo's language model is trained on."""
    return write_documents(world, default_cfg.corpus.mix, default_cfg.corpus.documents)


@pytest.fixture(scope="session")
def heldout(default_cfg: ToyworldConfig, documents: list[str]) -> list[str]:
    return split_documents(documents, default_cfg.corpus.heldout_share)[1]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    return make_tokenizer(documents[:20_000])


def replace(cfg: ToyworldConfig, **changes: object) -> ToyworldConfig:
    """A configuration with some values exchanged: `replace(cfg, seed=1, pretrain={"tokens": 1024})`."""
    parts = {
        part: dataclasses.replace(getattr(cfg, part), **values)
        if dataclasses.is_dataclass(getattr(cfg, part))
        else values
        for part, values in changes.items()
    }
    return dataclasses.replace(cfg, **parts)
