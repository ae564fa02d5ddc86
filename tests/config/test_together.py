"""What the stages of a run ask of each other is checked before any job."""

import pytest

from circuitmill.config.compose import freeze, load_run, read_frozen
from circuitmill.config.decode import decode
from circuitmill.config.run import Run, config_class
from circuitmill.errors import ConfigError

RESID = ["cache.hookpoint=resid_post", "cache.targets=inputs"]
SECOND = "cache.second_model={source: folder, name: other, revision: '', dtype: float32}"


def run_of(*overrides: str) -> Run:
    return load_run("tiny", list(overrides))


def variants_of(**variants: str) -> Run:
    """The tiny run with these variants; overrides of one are separated by commas."""
    quoted = {name: [f"'{item}'" for item in items.split(",") if item] for name, items in variants.items()}
    return run_of(*(f"+variants.{name}=[{','.join(items)}]" for name, items in quoted.items()))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.architecture.topology=plt"],
        ["train.architecture.topology=acausal"],
        ["train.architecture.topology=sae", *RESID],
        ["train.architecture.topology=sae", *RESID, "cache.layers=[1]"],
        ["train.architecture.topology=crosscoder", *RESID],
        ["train.architecture.topology=crosscoder", "train.architecture.models=2", *RESID, SECOND],
    ],
)
def test_what_goes_together(overrides: list[str]) -> None:
    run = run_of(*overrides)
    assert run.config("calibrate").hookpoint == run.config("cache").hookpoint


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_of(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.architecture.topology=sae"],
            "cache.targets: expected inputs with train.architecture.topology sae, which writes what it reads, found "
            "stored, with cache.hookpoint mlp",
        ),
        (
            RESID,
            "train.architecture.topology: expected sae or crosscoder with cache.targets inputs (cache.hookpoint "
            "resid_post), found clt",
        ),
        (
            ["train.architecture.topology=crosscoder", "train.architecture.models=2", *RESID],
            "train.architecture.models: expected 1, as cache.second_model is null, found 2",
        ),
        (
            ["train.architecture.topology=crosscoder", *RESID, SECOND],
            "train.architecture.models: expected 2, as cache.second_model is other, found 1",
        ),
        (
            ["train.architecture.topology=sae", *RESID, SECOND],
            "cache.second_model: expected null with train.architecture.topology sae: only a crosscoder reads two "
            "models, found other",
        ),
        (
            ["train.architecture.topology=sae", *RESID, "calibrate.hookpoint=mlp_in"],
            "calibrate.hookpoint: expected cache.hookpoint, resid_post, found mlp_in",
        ),
    ],
)
def test_what_does_not(overrides: list[str], words: str) -> None:
    text = complaint(*overrides)
    assert words in text and f"where: {words.split(':')[0]}" in text


def test_all_complaints_come_at_once_with_their_variants() -> None:
    with pytest.raises(ConfigError) as caught:
        variants_of(
            a="train.architecture.topology=sae",
            b="train.architecture.topology=sae,train.base=none",
            c="train.architecture.topology=plt",
        )
    text = str(caught.value)
    assert "found 2 problem(s)" in text and "where: cache.targets, train.base" in text
    assert "with cache.hookpoint mlp (name another hookpoint, such as resid_post) in a, b" in text
    assert "train.base: expected a variant of this run (a, b, c), or run/variant, found 'tiny/none' in b" in text


def test_only_variants_that_can_be_traced_have_prompts(tmp_path) -> None:
    run = variants_of(
        clt="",
        molt="train.architecture.topology=molt,train.architecture.ranks=[4],train.scaling=rms",
        skip="train.architecture.skip=true",
    )
    assert [len(run.config("attribute", name).units()) for name in run.variants] == [3, 0, 0]
    assert run.config("attribute", "clt").undefined == "" and "undefined" not in run.plain["attribute"]["clt"]
    molt = run.config("attribute", "molt")
    assert molt.undefined == run.config("train", "molt").architecture.untraceable != ""
    assert list(molt.prompts) == ["capital"]
    # the workflow freezes the plain data, from which the stage reads the same
    path = tmp_path / "attribute.yaml"
    path.write_text(freeze(run.plain["attribute"]["molt"], "attribute of run tiny, variant molt"))
    assert decode(config_class("attribute"), read_frozen(path), "attribute") == molt


def test_a_base_is_a_variant_of_this_run_or_of_another() -> None:
    run = variants_of(first="", then="train.base=first", other="train.base=gpt2/main", same="train.base=tiny/then")
    assert [run.base(name) for name in run.variants] == ["", "tiny/first", "gpt2/main", "tiny/then"]


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"a": "train.base=b"}, "a variant of this run (a), or run/variant, found 'tiny/b'"),
        ({"a": "train.base=tiny/b"}, "a variant of this run (a), or run/variant, found 'tiny/b'"),
        ({"a": "train.base=a"}, "a training that does not start from its own outcome, found a -> a in a"),
        ({"a": "train.base=b", "b": "train.base=tiny/a"}, "its own outcome, found a -> b -> a in a"),
        ({"a": "train.base=x/y/z"}, "a variant of this run, or run/variant, found 'x/y/z'"),
        ({"a": "train.base=../y"}, "a variant of this run, or run/variant, found '../y'"),
    ],
)
def test_a_base_that_is_not_there_or_leads_back(variants: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        variants_of(**variants)
    assert words.removesuffix(" in a") in str(caught.value) and "where: train.base" in str(caught.value)


def test_a_variant_that_leads_into_a_circle_is_not_in_it() -> None:
    with pytest.raises(ConfigError) as caught:
        variants_of(a="train.base=b", b="train.base=c", c="train.base=b")
    assert "found a -> b -> c -> b in a" in str(caught.value)
