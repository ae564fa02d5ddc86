"""The strict decoder: every complaint at once, with the dotted key and the nearest valid name."""

from dataclasses import dataclass
from typing import Literal

import pytest

from circuitmill.config.decode import decode
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["int8", "bf16"]


@dataclass(frozen=True)
class Outer:
    lr: float
    inner: Inner
    names: tuple[str, ...]
    limit: int | None
    shares: dict[str, float]
    flag: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError("a positive rate", found=self.lr, where="outer.lr", fix="raise it")


GOOD = {
    "lr": 1,
    "inner": {"size": 2, "kind": "int8"},
    "names": ["a", "b"],
    "limit": None,
    "shares": {"x": 1},
}


def test_decodes_nested_data_and_widens_only_int_to_float():
    value = decode(Outer, GOOD, "outer")
    assert value == Outer(1.0, Inner(2, "int8"), ("a", "b"), None, {"x": 1.0})
    assert isinstance(value.lr, float) and isinstance(value.shares["x"], float)


def test_reports_all_problems_at_once_with_dotted_keys():
    bad = {**GOOD, "lr": "fast", "inner": {"sizze": 2, "kind": "int9"}, "flag": 1}
    with pytest.raises(ConfigError) as caught:
        decode(Outer, bad, "outer")
    text = str(caught.value)
    assert "5 problem(s)" in text
    assert "outer.lr: expected float, found 'fast' (str)" in text
    assert "outer.inner.sizze: expected a known key (nearest valid key: outer.inner.size)" in text
    assert "outer.inner.size: expected int, found nothing" in text
    assert "outer.inner.kind: expected one of int8, bf16 (nearest: int8), found 'int9' (str)" in text
    assert "outer.flag: expected bool, found 1 (int)" in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("limit", "3", "outer.limit: expected int, found '3' (str)"),
        ("names", "a", "outer.names: expected a list of str, found 'a' (str)"),
        ("names", ["a", 1], "outer.names[1]: expected str, found 1 (int)"),
        ("shares", [1], "outer.shares: expected a mapping"),
        ("inner", 3, "outer.inner: expected a mapping, found 3 (int)"),
        ("lr", True, "outer.lr: expected float, found True (bool)"),
        ("lr", -1.0, "outer.lr: expected a positive rate, found -1.0 (raise it)"),
    ],
)
def test_refuses_a_value_of_the_wrong_type(key: str, value: object, message: str):
    with pytest.raises(ConfigError) as caught:
        decode(Outer, {**GOOD, key: value}, "outer")
    assert message in str(caught.value)


def test_not_a_mapping_at_all():
    with pytest.raises(ConfigError, match="outer: expected a mapping, found None"):
        decode(Outer, None, "outer")
