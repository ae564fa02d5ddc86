"""Train cross-layer transcoders on language models and trace attribution graphs with them.

`circuitmill.load`, `circuitmill.activations` and `circuitmill.replaced` are the API for notebooks; `circuitmill.api`
describes it.
"""

from typing import Any

__version__ = "0.1.0"

_API = ("load", "activations", "replaced")


def __getattr__(name: str) -> Any:
    """Import the API when it is first used: the command line and a dry run of the workflow start without torch."""
    if name in _API:
        import importlib

        return getattr(importlib.import_module("circuitmill.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
