"""Several units in one job: the finished ones survive the workflow's deletion of declared outputs."""

from pathlib import Path

import pytest
from tests.workflow.test_tiny_run import call, stage_command

from circuitmill import cli
from circuitmill.stores.aside import ASIDE
from circuitmill.stores.manifest import NAME, load_manifest

pytestmark = pytest.mark.slow

SHARDS = ("train-00000", "train-00001", "heldout-00000")


def command(folder: Path) -> list[str]:
    outs = [str(folder / shard) for shard in SHARDS]
    words = stage_command("cache", "--shard", *SHARDS)[1:]
    return [*words[: words.index("--out")], "--out", *outs]


def test_units_in_turn_equal_units_of_their_own(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_run)
    assert cli.main(command(tmp_path)) == 0
    for shard in SHARDS:
        own = (tiny_run / "results/tiny/cache/shard" / shard / NAME).read_bytes()
        assert (tmp_path / shard / NAME).read_bytes() == own
        assert not (tmp_path / shard / ASIDE).exists()


def test_a_job_that_failed_goes_on_with_the_unfinished(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from circuitmill.errors import InterruptedRun
    from circuitmill.stages import cache

    monkeypatch.chdir(tiny_run)
    made, run_unit = [], cache.run_unit

    def stop_at(last: str):
        def run(cfg, *, shard, **rest):
            if shard == last:
                raise InterruptedRun("no end", found="one", where=shard, fix="go on")
            made.append(shard)
            return run_unit(cfg, shard=shard, **rest)

        return run

    monkeypatch.setattr(cache, "run_unit", stop_at(SHARDS[1]))
    assert cli.main(command(tmp_path)) == 75
    assert made == [SHARDS[0]] and (tmp_path / SHARDS[0] / ASIDE).is_file()
    assert not (tmp_path / SHARDS[0] / NAME).exists()  # the workflow would delete it
    monkeypatch.setattr(cache, "run_unit", stop_at("none"))
    assert cli.main(command(tmp_path)) == 0
    assert made == list(SHARDS)
    assert load_manifest(tmp_path / SHARDS[0] / NAME, "cache", SHARDS[0]).counts


def test_what_was_finished_from_something_else_is_made_anew(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tiny_run)
    assert cli.main(command(tmp_path)) == 0
    first = tmp_path / SHARDS[0]
    (first / NAME).rename(first / ASIDE)
    config = tiny_run / "results/tiny/config/cache.yaml"
    changed = tmp_path / "cache.yaml"
    changed.write_text(config.read_text().replace("codec: int8", "codec: bf16"))
    words = command(tmp_path)
    words[words.index("--config") + 1] = str(changed)
    assert cli.main(words) == 0
    assert load_manifest(first / NAME, "cache", SHARDS[0]).config["codec"] == "bf16"


def test_as_many_folders_as_units(tiny_run: Path):
    done = call(tiny_run, *stage_command("cache", "--shard", *SHARDS))
    assert done.returncode == 2 and "3 folder(s), one for each shard; found 1" in done.stderr
