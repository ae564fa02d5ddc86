"""Adam's kernel without a GPU; `test_fused.py` compiles it."""

import pytest
from tests.kernels.interpreter import needs_triton, run_interpreted

pytestmark = needs_triton


@pytest.mark.slow
def test_updates_equal_the_formula():
    run_interpreted("interpreted_adam.py")
