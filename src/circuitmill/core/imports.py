"""Functions of other people, named in the configuration as `module:function`."""

import importlib
from collections.abc import Callable
from typing import Any

from circuitmill.errors import ConfigError


def function_at(path: str, where: str) -> Callable[..., Any]:
    """Import a function.

    >>> function_at("math:sqrt", "train.loss")(4)
    2.0

    Args:
        path: `module:function`.
        where: Dotted configuration key, for the message.

    Raises:
        ConfigError: the module cannot be imported, or has nothing callable of that name.
    """
    module, name = path.split(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "a function that can be imported", found=f"{path} ({error})", where=where, fix="install it, or correct it"
        ) from error
    if not callable(found):
        raise ConfigError("a function", found=f"{path}, {type(found).__name__}", where=where, fix="name a function")
    return found
