import time

import pytest
import wandb

from circuitmill.stores.mirror import WandbMirror, flat

HISTOGRAM = {"log10_edges": [-2.0, -1.0, 0.0], "counts": [[1, 2], [30, 40]]}


@pytest.fixture(autouse=True)
def no_mode(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def mirrored(folder, *rows):
    mirror = WandbMirror(folder, config={"lr": 1e-3}, identity="abc123")
    for row in rows:
        mirror.log(row)
    mirror.close()
    # the process that writes files, and has not always done so by now, does when it ends
    wandb.teardown()


def files(folder):
    """Oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*-abc123/*.wandb"))


def test_the_mirror_stays_offline_and_below_its_folder(tmp_path, capfd):
    mirrored(tmp_path, {"step": 1, "tokens": 32, "ev": 0.5, "l0": [1.0, 2.0], "speed": None})
    assert len(files(tmp_path)) == 1
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_groups_lists_and_histograms_have_flat_names_in_the_file(tmp_path):
    row = {"step": 1, "l0": [1.0, 2.0], "coefficients": {"kl": 0.25}, "density_histogram": HISTOGRAM}
    mirrored(tmp_path, row)
    (file,) = files(tmp_path)
    written = file.read_bytes()
    for piece in (b"l0/0", b"l0/1", b"coefficients/kl", b"density_histogram", b"[31,42]", b"[-2,-1,0]"):
        assert piece in written, piece


def test_flat_names_go_as_deep_as_the_row():
    nested = {"p5": [1, 2], "p50": [3, None]}
    assert flat({"step": 4, "heldout_l0_percentiles": nested, "empty": []}) == {
        "step": 4,
        "heldout_l0_percentiles/p5/0": 1,
        "heldout_l0_percentiles/p5/1": 2,
        "heldout_l0_percentiles/p50/0": 3,
        "heldout_l0_percentiles/p50/1": None,
    }


@pytest.mark.parametrize("key", ["log10_edges", "edges"])
def test_histograms_are_added_up_over_sources(key):
    value = flat({"h": {key: HISTOGRAM["log10_edges"], "counts": HISTOGRAM["counts"]}})["h"]
    assert value.to_json() == {"_type": "histogram", "values": [31, 42], "bins": [-2.0, -1.0, 0.0]}


def test_a_resumed_training_adds_a_part_of_the_same_run(tmp_path):
    mirrored(tmp_path, {"step": 1, "ev": 0.859375})
    (first,) = files(tmp_path)
    before = first.read_bytes()
    time.sleep(1)  # folders are named by the second
    mirrored(tmp_path, {"step": 2, "ev": 0.5})
    again, second = files(tmp_path)
    assert (again, again.read_bytes()) == (first, before)
    assert first.name == second.name == "run-abc123.wandb"
    assert b"0.859375" in before and b"0.859375" not in second.read_bytes()
