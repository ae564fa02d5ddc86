"""One name, everywhere: a stage is found under the same word in every place."""

import pytest
from tests.conftest import REPOSITORY

from circuitmill import cli
from circuitmill.config.run import config_class
from circuitmill.pipeline import STAGES


@pytest.mark.parametrize("name", [stage.name for stage in STAGES])
def test_stage_is_in_every_place(name: str):
    for place in (
        f"workflow/rules/{name}.smk",
        f"src/circuitmill/stages/{name}.py",
        f"src/circuitmill/config/{name}.py",
        f"tests/stages/test_{name}.py",
        f"docs/stages/{name}.md",
    ):
        assert (REPOSITORY / place).is_file(), place
    assert any((REPOSITORY / "config" / name).glob("*.yaml"))
    assert config_class(name).__name__ == f"{name.capitalize()}Config"
    assert name in cli._parser()._subparsers._group_actions[0].choices


def test_no_other_stage_modules():
    found = {path.stem for path in (REPOSITORY / "src/circuitmill/stages").glob("*.py")} - {"__init__"}
    names = {stage.name for stage in STAGES}
    assert names <= found
    # a part of a stage that would make its module too long has the stage's name in front
    # and what a run costs is of all of them
    assert {name.partition("_")[0] for name in found - names} <= names | {"cost"}
