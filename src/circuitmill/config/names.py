"""Names that stand for functions: those of our tables, and import paths of other people's."""

import difflib
import importlib.util
import re
from collections.abc import Collection

from circuitmill.errors import ConfigError

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")


def is_import_path(name: str) -> bool:
    """Whether a name says where to import a function from.

    >>> is_import_path("mypackage.losses:entropy"), is_import_path("relu")
    (True, False)
    """
    return bool(_PATH.match(name))


def require_known(name: str, known: Collection[str], where: str) -> None:
    """Refuse a name that is neither in a table nor an import path of a module that can be found.

    The module is looked up, not run.

    Raises:
        ConfigError: names the nearest known one.
    """
    if name in known or (is_import_path(name) and _can_be_found(name.split(":")[0])):
        return
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    raise ConfigError(
        f"one of {', '.join(known)}, or `module:function` of an installed module",
        found=repr(name),
        where=where,
        fix=f"nearest: {near[0]}" if near else "name one of them",
    )


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # a parent package is missing or cannot be imported; two dots in a row
        return False
