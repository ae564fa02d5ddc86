"""Every experiment composes and decodes; overrides are strict; variants apply after the run's own overrides."""

from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

from circuitmill.config.compose import compose, experiments, freeze, load_run, read_frozen
from circuitmill.config.decode import decode
from circuitmill.config.run import Run, config_class
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
                cfg = run.config(row.name, variant)
                assert len(set(cfg.units())) == len(cfg.units())
                assert cfg.units() or (row.name == "attribute" and cfg.undefined)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_file_decodes(path: Path):
    stage = path.parent.name
    decode(config_class(stage), compose([f"{stage}={path.stem}"])[stage], stage)


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


def test_variants_that_agree_in_the_shared_stages_share_them():
    run = load_run("demo", ["+variants.a=['train.seed=5']", "+variants.b=[]"])
    assert run.variants == ("a", "b")
    assert run.config("train", "a").seed == 5 != run.config("train", "b").seed
    assert list(run.stages["cache"]) == [""] and run.home("cache", "b") == "" and run.divided() == ()
    assert run.config("cache") is run.config("cache", "a")
    with pytest.raises(ConfigError, match="a variant name"):
        load_run("demo", ["+variants.config=[]"])


def variants_of(**overrides: str) -> Run:
    """The demo with these variants; overrides are separated by commas."""
    quoted = {name: [f"'{item}'" for item in items.split(",") if item] for name, items in overrides.items()}
    return load_run("demo", [f"+variants.{name}=[{','.join(items)}]" for name, items in quoted.items()])


def test_variants_share_a_stage_by_its_content_and_that_of_the_stages_before():
    run = variants_of(
        a="cache.codec=bf16,train.seed=0",
        b="cache.codec=int4,train.seed=0",
        c="cache.codec=bf16,train.seed=1",
        d="cache.codec=int4,tokenize.max_train_tokens=64000",
    )
    assert run.homes["toyworld"] == dict.fromkeys("abcd", "")
    assert run.homes["tokenize"] == {"a": "a", "b": "a", "c": "a", "d": "d"}
    # the same options, but of other text
    assert run.homes["calibrate"] == run.homes["tokenize"]
    assert run.homes["cache"] == {"a": "a", "b": "b", "c": "a", "d": "d"}
    assert run.homes["train"] == {name: name for name in "abcd"}
    assert run.divided() == ("tokenize", "calibrate", "cache")
    assert [run.config("cache", name).codec for name in "abcd"] == ["bf16", "int4", "bf16", "int4"]
    assert list(run.stages["cache"]) == list(run.plain["cache"]) == ["a", "b", "d"]
    with pytest.raises(ConfigError, match="a variant of run demo: a, b, c, d; found 'e'"):
        run.home("cache", "e")


def test_an_override_that_changes_nothing_divides_nothing():
    codec = load_run("demo").config("cache").codec
    assert variants_of(a=f"cache.codec={codec}", b="train.seed=3").divided() == ()


def test_variants_may_differ_in_the_model_but_not_in_whether_it_is_the_embedded_one():
    run = variants_of(a="", b="model.dtype=bfloat16")
    assert run.divided() == ("tokenize", "calibrate", "cache")
    assert run.config("cache", "b").model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"all on the embedded model, or none of them; found model\.source=folder"):
        variants_of(a="", b="model.source=folder")


@pytest.mark.parametrize("item", ["name=other", "experiment=tiny", "+trian.seed=1"])
def test_variants_override_nothing_but_stages_and_model(item: str):
    with pytest.raises(ConfigError, match="a variant that overrides options of stages or of the model only"):
        variants_of(a="", b=item)


def test_codec_study_trains_every_seed_on_every_codec():
    run = load_run("codec_study")
    runs = {(run.config("cache", name).codec, run.config("train", name).seed) for name in run.variants}
    codecs = {codec for codec, _ in runs}
    assert codecs == {"bf16", "int8", "int4", "int2", "entropy"} and len(runs) == len(run.variants) == 15
    for name in run.variants:
        assert name == f"{run.config('cache', name).codec}-{run.config('train', name).seed}"
    assert run.divided() == ("cache",) and len(run.stages["cache"]) == 5
    assert len(run.config("attribute", run.variants[0]).units()) == 5
