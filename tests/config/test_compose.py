"""Every experiment composes and decodes; overrides are strict; variants apply after the run's own overrides."""

from pathlib import Path

import pytest
import yaml
from tests.conftest import REPOSITORY

from circuitmill.config.compose import compose, experiments, freeze, load_run, read_frozen
from circuitmill.config.decode import decode
from circuitmill.config.run import config_class
from circuitmill.errors import ConfigError
from circuitmill.pipeline import STAGES

OPTIONS = sorted(
    path for stage in STAGES for path in (REPOSITORY / "config" / stage.name).glob("*.yaml") if path.stem != "config"
)


@pytest.mark.parametrize("name", experiments())
def test_experiment_is_complete_and_says_what_it_costs(name: str):
    run = load_run(name)
    assert run.name == name
    head = (REPOSITORY / "config/experiment" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "Costs:" in head
    for row in STAGES:
        if row.unit and row.name in run.stages:
            for variant in run.stages[row.name]:
                units = run.config(row.name, variant).units()
                assert units and len(set(units)) == len(units)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_file_decodes(path: Path):
    stage = path.parent.name
    data = yaml.safe_load(path.read_text())
    tree = compose(["experiment=demo"])
    data = {**data, **({"model": tree["model"]} if "model" in data else {})}
    for key, value in data.items():
        if isinstance(value, str) and value.startswith("${"):
            group, _, name = value[2:-1].partition(".")
            if name:
                data[key] = tree[group][name]
    decode(config_class(stage), data, stage)


def test_unknown_experiment_and_key_name_what_there_is():
    with pytest.raises(ConfigError, match="experiments: .*demo"):
        load_run("demon")
    with pytest.raises(ConfigError, match="lrr"):
        load_run("demo", ["train.lrr=1"])
    with pytest.raises(ConfigError, match=r"train\.lrr: expected a known key"):
        load_run("demo", ["+train.lrr=1"])


def test_frozen_text_reads_back(tmp_path: Path):
    run = load_run("demo")
    path = tmp_path / "train.yaml"
    path.write_text(freeze(run.plain["train"]["main"], "train of run demo"))
    assert decode(config_class("train"), read_frozen(path), "train") == run.config("train", "main")


def test_missing_frozen_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="a frozen stage configuration"):
        read_frozen(tmp_path / "none.yaml")


def test_variants_override_train_and_later_only():
    run = load_run("demo", ["+variants.a=['train.seed=5']", "+variants.b=[]"])
    assert run.variants == ("a", "b")
    assert run.config("train", "a").seed == 5 != run.config("train", "b").seed
    assert list(run.stages["cache"]) == [""]
    with pytest.raises(ConfigError, match="a variant that overrides train or later stages only"):
        load_run("demo", ["+variants.a=['cache.train_shards=2']"])
    with pytest.raises(ConfigError, match="a variant name"):
        load_run("demo", ["+variants.config=[]"])
