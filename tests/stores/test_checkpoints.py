import json
import os
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tests.conftest import REPOSITORY
from tests.stores import checkpoint_ranks

from circuitmill.errors import StoreError
from circuitmill.stores import sharded
from circuitmill.stores.checkpoints import Checkpoints, Part
from circuitmill.stores.tensors import read_tensors

FILE = "shard-00001-model-00001-of-00001.safetensors"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "parameter.W": torch.full((2, 3), float(value)),
        "idle": torch.arange(4),
        "random_state": torch.get_rng_state(),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    plain = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*plain)


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as made:
        for step in (10, 20, 30):
            made.save(step, tensors(step))
        made.wait()
        yield made


# one process


def test_every_dtype_comes_back_bit_by_bit(tmp_path):
    whole = checkpoint_ranks.whole()
    with Checkpoints(tmp_path, keep=1) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.save(30, whole)
        last = checkpoints.last()
    assert last.step == 30
    assert last.entries == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()}
    found = last.read_all()
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert same_bits(found[name], value), name


def test_the_newest_stay(checkpoints):
    assert checkpoints.steps() == [20, 30]


def test_none_at_the_start(tmp_path):
    assert Checkpoints(tmp_path / "nothing", keep=1).last() is None


def test_what_a_kill_left_is_neither_read_nor_kept(checkpoints):
    partial = checkpoints.folder / ".step-00000040.partial"
    partial.mkdir()
    (partial / FILE).write_bytes(b"half")
    assert checkpoints.last().step == 30
    checkpoints.save(40, tensors(40))
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000030", "step-00000040"]


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(30, tensors(-1))
    assert checkpoints.last().read_all()["parameter.W"][0, 0] == -1
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_those_made_for_a_value_of_l0_stay(checkpoints):
    checkpoints.save(35, tensors(35), 12.5)
    for step in (40, 50, 60):
        checkpoints.save(step, tensors(step))
    checkpoints.save(60, tensors(60), 8.0)
    checkpoints.wait()
    names = ["l0-00008.00-step-00000060", "l0-00012.50-step-00000035", "step-00000050", "step-00000060"]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == names
    assert checkpoints.steps() == [50, 60]
    assert {l0: path.name for l0, path in checkpoints.kept().items()} == {12.5: names[1], 8.0: names[0]}
    assert list(checkpoints.kept()) == [12.5, 8.0]


def test_a_training_goes_on_from_the_newest_of_both_sorts(checkpoints):
    checkpoints.save(35, tensors(35), 100.0)
    assert checkpoints.last().step == 35 and checkpoints.last().read_all()["parameter.W"][0, 0] == 35
    checkpoints.save(40, tensors(40))
    assert checkpoints.last().step == 40


def test_there_is_a_description_and_no_pickle(checkpoints):
    folder = checkpoints.folder / "step-00000030"
    assert sorted(path.name for path in folder.iterdir()) == [FILE, "state.json"]
    info = json.loads((folder / "state.json").read_text())
    assert info.keys() == {"format", "step", "ranks", "files"}
    assert (info["format"], info["step"], info["ranks"]) == (2, 30, 1)
    assert info["files"][FILE]["bytes"] == (folder / FILE).stat().st_size


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def describe(folder: Path, **changes: object) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / FILE).unlink(), "found no file"),
        (lambda f: flip(f / FILE), "sha256"),
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1]), "sha256"),
        (lambda f: (f / "state.json").unlink(), "a checkpoint's description"),
        (lambda f: (f / "state.json").write_text("{"), "a checkpoint's description"),
        (lambda f: (f / "state.json").write_text("[]"), "a checkpoint's description"),
        (lambda f: describe(f, format=9), "(format, step) = (2, 30); found (9, 30)"),
        (
            lambda f: (f / "state.json").write_text('{"format": 1, "step": 30}'),
            "(format, step) = (2, 30); found (1, 30)",
        ),
        (lambda f: (f / "more.safetensors").write_bytes((f / FILE).read_bytes()), "more.safetensors"),
    ],
)
def test_a_damaged_newest_checkpoint_is_an_error_and_not_the_one_before(checkpoints, damage, words):
    damage(checkpoints.folder / "step-00000030")
    with pytest.raises(StoreError) as caught:
        checkpoints.last()
    assert words in str(caught.value) and "step-00000030" in str(caught.value)
    assert "to continue from the checkpoint before it" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"W": torch.zeros(2, 3)}, "no tensor of that name"),
        ({"parameter.W": torch.zeros(3, 2)}, "found ((2, 3), torch.float32)"),
        ({"parameter.W": torch.zeros(2, 3, dtype=torch.float64)}, "found ((2, 3), torch.float32)"),
        ({"parameter.W": Part(torch.zeros(1, 3), 0, 0, 3)}, "found ((2, 3), torch.float32)"),
        ({"parameter.W": Part(torch.zeros(1, 3), 0, 2, 2)}, "a part inside its whole"),
    ],
)
def test_what_is_wanted_must_be_there_and_nothing_is_filled_before(checkpoints, wanted, words):
    idle = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(StoreError) as caught:
        checkpoints.last().read({"idle": idle, **wanted})
    assert words in str(caught.value)
    assert not idle.any()


def test_a_part_is_read_into_a_view_of_other_strides(checkpoints):
    turned = torch.zeros(3, 1).t()
    checkpoints.save(40, {"W": torch.arange(6.0).reshape(2, 3)})
    checkpoints.last().read({"W": Part(turned, 0, 1, 2)})
    assert turned.tolist() == [[3, 4, 5]]


def test_large_tensors_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "FILE_BYTES", 100)
    state = {"W": torch.arange(300.0).reshape(2, 50, 3).transpose(0, 1), "b": torch.arange(3), "c": torch.arange(200)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state)
        last = checkpoints.last()
    for path in last.folder.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in read_tensors(path).values()) <= 100
    found = last.read_all()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_elements_that_no_file_holds_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "FILE_BYTES", 100)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"W": torch.arange(75.0)})
        folder = checkpoints.last().folder
        files = json.loads((folder / "state.json").read_text())["files"]
        assert len(files) == 3
        gone = sorted(files)[1]
        (folder / gone).unlink()
        describe(folder, files={name: about for name, about in files.items() if name != gone})
        with pytest.raises(StoreError, match="all elements of W; found 25 in no file"):
            checkpoints.last().read_all()


def test_a_file_that_goes_before_it_is_read_has_a_name(checkpoints):
    last = checkpoints.last()
    (last.folder / FILE).unlink()
    with pytest.raises(StoreError, match="files of a checkpoint; found .*No such file") as caught:
        last.read_all()
    assert FILE in str(caught.value)


@pytest.fixture
def held(monkeypatch):
    """Holds back the bytes of every file until the event is set."""
    go, save = threading.Event(), safetensors.torch.save

    def waiting(*arguments, **named):
        assert go.wait(60)
        return save(*arguments, **named)

    monkeypatch.setattr(safetensors.torch, "save", waiting)
    yield go
    go.set()


def test_the_state_may_change_after_save_and_the_file_has_the_old_values(tmp_path, held):
    state = {"W": torch.ones(4), "part": Part(torch.ones(2, 2), 0, 0, 2), "step": torch.tensor(5)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(5, state)
        assert checkpoints.steps() == []
        for tensor in (state["W"], state["part"].tensor, state["step"]):
            tensor.zero_()
        held.set()
        found = checkpoints.last().read_all()
    assert [found[name].unique().tolist() for name in ("W", "part", "step")] == [[1], [1], [5]]


def test_leaving_waits_for_the_write(tmp_path, held):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(5, tensors(5))
        threading.Timer(0.1, held.set).start()
    assert checkpoints.steps() == [5]


def test_a_write_that_fails_is_told_by_the_next_save_and_keeps_the_checkpoints_before(checkpoints, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(safetensors.torch, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        checkpoints.save(40, tensors(40))
        with pytest.raises(StoreError, match="rank 0: OSError: .* No space left"):
            checkpoints.save(50, tensors(50))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000030"]
    checkpoints.save(50, tensors(50))
    assert checkpoints.last().step == 50


def test_what_ended_a_training_is_raised_and_not_a_write_that_failed_too(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(safetensors.torch, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(KeyError), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(5, tensors(5))
        raise KeyError
    assert "No space left" in caplog.text


def test_ranks_without_a_group_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"\(rank, size\) = \(1, 2\); found \(0, 1\)"):
        Checkpoints(tmp_path, keep=1, rank=1, size=2)


# several processes


def launch(scenario: str, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.stores.checkpoint_ranks", scenario, str(folder)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    launch("spread", folder)
    return folder


@pytest.mark.parametrize("saved", ["four", "mesh", "one"])
@pytest.mark.parametrize("size", checkpoint_ranks.READERS)
def test_any_number_of_ranks_reads_what_another_number_wrote(spread, saved, size):
    for rank in range(size):
        found = read_tensors(spread / f"{saved}-read-by-{size}-{rank}.safetensors")
        expected = checkpoint_ranks.spread(checkpoint_ranks.whole(), rank, size)
        assert found.keys() == expected.keys()
        for name, entry in expected.items():
            assert same_bits(found[name], sharded.values_of(entry)), (name, rank)


@pytest.mark.parametrize("saved", ["four", "mesh", "one"])
def test_one_process_reads_the_whole_of_what_any_number_wrote(spread, saved):
    whole, found = checkpoint_ranks.whole(), Checkpoints(spread / saved, keep=1).last().read_all()
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize(("saved", "ranks"), [("four", 4), ("mesh", 4), ("one", 1)])
def test_every_element_is_written_once_and_by_all_ranks(spread, saved, ranks):
    folder = spread / saved / "step-00000007"
    elements, writers = Counter(), set()
    for path in folder.glob("*.safetensors"):
        writers.add(path.name[:11])
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                elements[name] += file.get_tensor(name).numel()
    assert elements == Counter({name: tensor.numel() for name, tensor in checkpoint_ranks.whole().items()})
    assert len(writers) == ranks == json.loads((folder / "state.json").read_text())["ranks"]


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("fail")
    launch("fail", folder)
    return [json.loads((folder / f"heard-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("write", "found rank 1: OSError: [Errno 27] File too large"),
        ("copy", "found rank 1: MemoryError: no memory for a copy"),
        ("shape", "found ((40001,), torch.float32, 0) on rank 1"),
        ("type", "found ((40000,), torch.float64, None) on rank 1"),
        ("gap", "found one that ends at 19999 and one that starts at 20001"),
        ("overlap", "found one that ends at 20001 and one that starts at 19999"),
        ("outside", "start 20001, total 40000"),
        ("step", "found ['step-00000005', 'step-00000006']"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_leaves_what_was_there(heard, attempt, words):
    for rank in heard:
        assert words in rank[attempt]
        assert rank[f"{attempt} left"] == "step-00000001"


def test_the_save_after_one_that_failed_is_whole(heard):
    for rank in heard:
        assert (rank["first"], rank["next"], rank["next left"]) == ("saved", "saved", "step-00000009")


def test_damage_that_one_rank_finds_is_raised_on_all(heard):
    for rank in heard:
        for number in range(2):
            assert f"shard-0000{number + 1}-model-00001-of-00001.safetensors" in rank[f"damaged {number}"]
            assert "(bytes, sha256)" in rank[f"damaged {number}"]
        assert rank["restored"] == "9"


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    launch("kill", folder)
    return folder


@pytest.mark.parametrize(("ranks", "left"), [("one", [0]), ("first", [1]), ("all", [])])
def test_ranks_killed_while_writing_leave_the_checkpoint_before(killed, ranks, left):
    for rank in left:
        assert "all ranks at the checkpoint" in (killed / ranks / f"heard-{rank}.txt").read_text()
    with Checkpoints(killed / ranks / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        last = checkpoints.last()
        assert last.step == 1 and last.read_all()["W"].tolist() == [0, 0, 0, 1, 1, 1]
        checkpoints.save(2, {"W": torch.ones(6)})
        assert checkpoints.last().step == 2
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_a_kill_at_any_access_to_the_disk_leaves_whole_checkpoints(tmp_path):
    """Of steps 1 and 2, of which 2 is saved again with other values and then 3, which makes 1 one too many."""
    launch("moments", tmp_path)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert [outcome["killed"] for outcome in outcomes] == [True] * (len(outcomes) - 1) + [False]
    stages = [[[2, 2.0], [1, 1.0]], [[2, 2.5], [1, 1.0]], [[3, 3.0], [2, 2.5], [1, 1.0]], [[3, 3.0], [2, 2.5]]]
    reached = [stages.index(outcome["whole"]) for outcome in outcomes]
    assert reached == sorted(reached) and set(reached) == {0, 1, 2, 3}
