"""Runs a file of tests in Triton's interpreter: on a CPU, in a process of its own.

Triton decides when it is imported whether it interprets, and for a whole process; other tests need it as it is, or
compile for a GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")


def run_interpreted(name: str) -> None:
    """Run one of the files beside this one; its tests must all pass, and there must be some."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(name))],
        cwd=REPOSITORY,
        env={key: value for key, value in environment.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
