"""What stands before the command of every job: which interpreter it finds, which package, and what must be there."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from circuitmill import __version__
from circuitmill.errors import ConfigError
from circuitmill.pipeline import STAGES

REVISIONS = "/opt/circuitmill/revisions"
"""File of an image that holds `revisions` of the package in there."""

EXPECTED = "CIRCUITMILL_REVISIONS"
"""Variable with the workflow's `revisions`, for an image that a job starts by itself."""

_LOADED = """case ":${LOADEDMODULES:-}:" in *:NAME:* | *:NAME/*) ;; *) FAIL ;; esac"""
_IN_CONTAINER = """if [ -n "${SINGULARITY_CONTAINER:-}" ]; then
unset PYTHONPATH PYTHONHOME
made="$(cat REVISIONS)" && [ "$made" = EXPECTED ] || FAIL
else
HERE
fi"""


def revisions() -> str:
    """The version of the package and the revision of every stage: with the same ones results are the same."""
    return " ".join([__version__, *(f"{stage.name}:{stage.revision}" for stage in STAGES)])


def job_prefix(methods: Collection[str], *, python: Path, source: Path, modules: Sequence[str] = ()) -> str:
    """Shell text for Snakemake's `shell.prefix`, in which braces are doubled.

    Args:
        methods: How software is deployed, by Snakemake's names: CONDA, APPTAINER, ENV_MODULES.
        python: The interpreter that Snakemake runs on.
        source: Folder of the package in the checkout.
        modules: Environment modules that Snakemake loads before. It goes on when one cannot be loaded.
    """
    lines = ["set -euo pipefail"]
    for name in modules if "ENV_MODULES" in methods else ():
        found = "found '${LOADEDMODULES:-}'"
        fix = "correct `modules` in the site file, or BASH_ENV, which must name the init script of the command module"
        lines.append(
            _LOADED.replace("NAME", shlex.quote(name)).replace("FAIL", _fail(f"the module {name}", found, fix))
        )
    here, own = f"export PATH={shlex.quote(str(python.parent))}:$PATH", shlex.quote(revisions())
    if "CONDA" in methods:
        # the environment has an interpreter and all that is pinned, but not the package
        lines.append(f"export PYTHONPATH={shlex.quote(str(source))}")
    elif "APPTAINER" in methods:
        # a virtual environment below the working folder can be seen in a container; its interpreter is not the image's
        fail = _fail(f"an image with {revisions()}", "found one with ${made:-nothing}", "run containers/build again")
        text = _IN_CONTAINER.replace("REVISIONS", REVISIONS).replace("EXPECTED", own)
        lines.append(text.replace("FAIL", fail).replace("HERE", f"{here} {EXPECTED}={own}"))
    else:
        lines.append(here)
    return "\n".join([*lines, ""]).replace("{", "{{").replace("}", "}}")


def check_revisions(env: Mapping[str, str]) -> None:
    """See that this package is the one that a job expects in the image which it started.

    Args:
        env: The environment's variables.

    Raises:
        ConfigError: it is another.
    """
    if env.get(EXPECTED, revisions()) != revisions():
        raise ConfigError(
            f"an image with {env[EXPECTED]}", found=revisions(), where="the image", fix="run containers/build again"
        )


def _fail(expected: str, found: str, fix: str) -> str:
    """A command that says what is wrong and ends the job."""
    said = f"circuitmill: expected {expected}, {found}; {fix}".replace("`", "\\`")
    return f'{{ echo "{said}" >&2; exit 2; }}'
