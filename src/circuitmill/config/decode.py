"""From plain data to frozen dataclasses: strict, and all complaints at once.

Nothing is converted silently, except an int where a float is asked for and a list where a tuple is. An unknown key is
an error that names the nearest valid one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from circuitmill.errors import ConfigError

T = TypeVar("T")

_FIX = "correct the option file or the override; `circuitmill config` shows every key with its value"


@dataclasses.dataclass(frozen=True)
class Complaint:
    """One thing that is wrong with one key."""

    key: str
    expected: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}" + (f" ({self.fix})" if self.fix else "")


def decode(cls: type[T], data: object, prefix: str) -> T:
    """Make a frozen dataclass from plain data.

    Args:
        cls: A dataclass whose fields are int, float, bool, str, Literal, tuple[X, ...], dict[str, X], X | None or
            another dataclass.
        data: What YAML gave.
        prefix: Dotted key of this part of the configuration, for messages.

    Raises:
        ConfigError: unknown keys, missing keys, values of the wrong type or that make no sense: all of them.
    """
    complaints: list[Complaint] = []
    value = _dataclass(cls, data, prefix, complaints)
    if complaints:
        raise ConfigError(
            f"a valid configuration of {prefix}",
            found=f"{len(complaints)} problem(s)\n    " + "\n    ".join(map(str, complaints)),
            where=", ".join(complaint.key for complaint in complaints),
            fix=_FIX,
        )
    return value


def _dataclass(cls: type, data: object, key: str, complaints: list[Complaint]) -> Any:
    if not isinstance(data, Mapping):
        complaints.append(Complaint(key, "a mapping", _show(data)))
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)
            hint = f" (nearest valid key: {key}.{near[0]})" if near else ""
            complaints.append(Complaint(f"{key}.{name}", f"a known key{hint}", "an unknown one"))
    values, before = {}, len(complaints)
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{key}.{name}", complaints)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            complaints.append(Complaint(f"{key}.{name}", type_name(hints[name]), "nothing"))
    if len(complaints) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        complaints.append(Complaint(str(error.where), error.expected, str(error.found), error.fix))
        return None


def _value(hint: Any, data: object, key: str, complaints: list[Complaint]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        rest = [arg for arg in args if arg is not type(None)]
        return _value(rest[0], data, key, complaints)
    if origin is typing.Literal:
        if data in args and type(data) in {type(arg) for arg in args}:
            return data
        near = difflib.get_close_matches(str(data), [str(arg) for arg in args], n=1)
        complaints.append(Complaint(key, type_name(hint) + (f" (nearest: {near[0]})" if near else ""), _show(data)))
        return None
    if origin is tuple:
        if isinstance(data, list | tuple):
            return tuple(_value(args[0], item, f"{key}[{index}]", complaints) for index, item in enumerate(data))
    elif origin is dict:
        if isinstance(data, Mapping):
            return {str(name): _value(args[1], item, f"{key}.{name}", complaints) for name, item in data.items()}
    elif dataclasses.is_dataclass(hint):
        return _dataclass(hint, data, key, complaints)  # type: ignore[arg-type]
    elif hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    elif type(data) is hint or hint is Any:
        return data
    complaints.append(Complaint(key, type_name(hint), _show(data)))
    return None


def type_name(hint: Any) -> str:
    """A type as a reader of the configuration would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else type_name(arg) for arg in args)
    if origin is tuple:
        return f"a list of {type_name(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _show(data: object) -> str:
    return f"{data!r} ({type(data).__name__})"
