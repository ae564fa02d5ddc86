import json

import pytest
import torch

from circuitmill.errors import StoreError
from circuitmill.stores.checkpoints import Checkpoints


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "parameter.W": torch.full((2, 3), value),
        "idle": torch.arange(4),
        "random_state": torch.get_rng_state(),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        made.save(step, tensors(step))
    return made


def test_every_dtype_comes_back_bit_by_bit(checkpoints):
    last = checkpoints.last()
    assert last.step == 30
    for name, value in tensors(30).items():
        assert last.tensors[name].dtype == value.dtype and torch.equal(last.tensors[name], value)


def test_the_newest_stay(checkpoints):
    assert checkpoints.steps() == [20, 30]


def test_none_at_the_start(tmp_path):
    assert Checkpoints(tmp_path / "nothing", keep=1).last() is None


def test_what_a_kill_left_is_neither_read_nor_kept(checkpoints):
    partial = checkpoints.folder / ".step-00000040.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    assert checkpoints.last().step == 30
    checkpoints.save(40, tensors(40))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000030", "step-00000040"]


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(30, tensors(-1))
    assert checkpoints.last().tensors["parameter.W"][0, 0] == -1


def test_those_made_for_a_value_of_l0_stay(checkpoints):
    checkpoints.save(35, tensors(35), 12.5)
    for step in (40, 50, 60):
        checkpoints.save(step, tensors(step))
    checkpoints.save(60, tensors(60), 8.0)
    names = ["l0-00008.00-step-00000060", "l0-00012.50-step-00000035", "step-00000050", "step-00000060"]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == names
    assert checkpoints.steps() == [50, 60]
    assert {l0: path.name for l0, path in checkpoints.kept().items()} == {12.5: names[1], 8.0: names[0]}
    assert list(checkpoints.kept()) == [12.5, 8.0]


def test_a_training_goes_on_from_the_newest_of_both_sorts(checkpoints):
    checkpoints.save(35, tensors(35), 100.0)
    assert checkpoints.last().step == 35 and checkpoints.last().tensors["parameter.W"][0, 0] == 35
    checkpoints.save(40, tensors(40))
    assert checkpoints.last().step == 40


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "state.safetensors").unlink(), "found no file"),
        (lambda f: flip(f / "state.safetensors"), "sha256"),
        (lambda f: (f / "state.json").write_text("{"), "a checkpoint's description"),
        (lambda f: (f / "state.json").write_text(json.dumps({"format": 9, "bytes": 0, "sha256": ""})), "(9, 0, '')"),
    ],
)
def test_a_damaged_newest_checkpoint_is_an_error_and_not_the_one_before(checkpoints, damage, words):
    damage(checkpoints.folder / "step-00000030")
    with pytest.raises(StoreError) as caught:
        checkpoints.last()
    assert words in str(caught.value) and "step-00000030" in str(caught.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
