"""Sizes, axis words and other habits that a reader relies on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

from circuitmill.core import axes

SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py")) + sorted((REPOSITORY / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_and_functions_are_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 100, f"{node.name} is too long"


def test_shapes_use_the_words_of_axes():
    known = set(axes.AXES)
    unknown = {}
    for path in SOURCES:
        for shape in re.findall(
            r'(?:Float|Int|Bool|UInt8|Num|Shaped|Integer|Real)\[[\w.]+, "([^"]*)"\]', path.read_text()
        ):
            for word in shape.replace("*", "").replace("#", "").split():
                if word not in known and not word.isdigit() and word not in ("...", "_"):
                    unknown.setdefault(word, []).append(path.name)
    assert not unknown


def test_markers_are_strict(tmp_path: Path):
    test = tmp_path / "test_marker.py"
    test.write_text("import pytest\n\n@pytest.mark.misspelt\ndef test():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(REPOSITORY / "pyproject.toml"), str(test)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0 and "misspelt" in done.stdout


def test_no_machine_paths_or_unsafe_loading():
    for path in SOURCES:
        text = path.read_text()
        for word in ("/work/", "/tmp/", "import pickle", "torch.load(", "torch.save(", "weights_only=False"):
            assert word not in text, f"{word} in {path.name}"
