"""Pages that are generated from the code agree with it; `make docs` rewrites them."""

import pytest
from tests.conftest import REPOSITORY

from circuitmill.config.compose import load_run
from circuitmill.config.describe import markdown, options
from circuitmill.config.run import config_class
from circuitmill.pipeline import STAGES


def test_config_readme(request: pytest.FixtureRequest):
    path, text = REPOSITORY / "config/README.md", markdown(load_run("demo"))
    if request.config.getoption("--fix"):
        path.write_text(text)
    assert path.read_text() == text, "run `make docs`"


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_every_option_has_a_meaning(stage: str):
    cfg = next(iter(load_run("demo").stages[stage].values()))
    assert [option.key for option in options(config_class(stage), cfg, stage) if not option.meaning] == []
