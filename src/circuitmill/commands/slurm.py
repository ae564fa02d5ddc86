"""`circuitmill status`, `cancel` and `resume`: a run that the workflow works on, here or on a Slurm cluster."""

from typing import Any


def add(commands: Any) -> None:
    """Add the subcommands."""
