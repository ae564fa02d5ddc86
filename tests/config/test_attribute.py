from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from circuitmill.config.attribute import AttributeConfig
from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError

OPTIONS = Path(__file__).parents[2] / "config" / "attribute"


def load(option: str, source: str = "toyworld", **changes: object) -> AttributeConfig:
    data = yaml.safe_load((OPTIONS / f"{option}.yaml").read_text())
    model = {"source": source, "name": "m", "revision": "", "dtype": "float32"}
    return decode(AttributeConfig, {**data, "model": model, **changes}, "attribute")


def test_units_are_numbered_circuits_then_prompts() -> None:
    cfg = load("tiny", circuits={"two_hop": 2, "ioi": 0}, prompts={"mine": "text"})
    assert cfg.units() == ("two_hop-00", "two_hop-01", "mine")
    assert cfg.circuit_of() == {"two_hop-00": ("two_hop", 0), "two_hop-01": ("two_hop", 1)}


def test_every_option_file_is_valid() -> None:
    assert len([name for name in load("default").units() if name.startswith("two_hop-")]) == 10
    assert load("tiny").units()
    assert load("prompts", source="folder").units() == ("two_hop", "opposite", "names")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "with space", "-x", "é", "a" * 65, "a.b"])
def test_a_name_that_is_no_safe_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits") as caught:
        load("tiny", prompts={name: "text"})
    assert f"attribute.prompts.{name}" in str(caught.value)
    with pytest.raises(ConfigError, match="letters, digits"):
        load("tiny", circuits={f"/{name}": 1})


@pytest.mark.parametrize("prompts", [{"two_hop-00": "text"}, {"mine": "a", "Mine": "b"}])
def test_names_that_would_share_a_folder_are_refused(prompts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="differ in more than their capitals"):
        load("tiny", prompts=prompts)


def test_circuits_need_the_embedded_model() -> None:
    with pytest.raises(ConfigError, match=r"attribute\.circuits.*embedded") as caught:
        load("default", source="folder")
    assert "attribute.circuits" in str(caught.value)
    assert load("tiny", source="folder", circuits={"two_hop": 0}).units() == ("capital",)


def test_nothing_to_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one circuit or prompt"):
        load("tiny", circuits={}, prompts={})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_logits", 0),
        ("max_feature_nodes", -1),
        ("feature_windows", 0),
        ("logit_mass", 0.0),
        ("node_threshold", 1.5),
        ("edge_threshold", -0.1),
        ("verify_edges", -1),
    ],
)
def test_values_out_of_range_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(load("tiny"), **{key: value})
    assert f"attribute.{key}" in str(caught.value)
    assert str(value) in str(caught.value)
