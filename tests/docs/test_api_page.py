import re

from tests.conftest import REPOSITORY
from tests.stages.small_run import make_cache, make_train, random_transcoder


def test_the_example_of_the_page_runs(tmp_path, tiny_model_dir, capsys):
    paths = make_cache(tmp_path, tiny_model_dir)
    make_train(tmp_path / "run/main/train", paths["cache"], random_transcoder(paths["cache"]))
    (tmp_path / "run/toyworld").mkdir()
    (tmp_path / "run/toyworld/model").symlink_to(tiny_model_dir)
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/api.md").read_text(), re.DOTALL)
    code = code.replace('run = "results/demo"', f'run = "{tmp_path}/run"')
    # the model of the tests has a short context
    code = code.replace("The capital of the state containing Dallas is", "Dallas is in")
    exec(compile(code, "docs/api.md", "exec"), {})  # noqa: S102
    said = capsys.readouterr().out
    assert "explained:" in said and "features per token:" in said and "next:" in said
