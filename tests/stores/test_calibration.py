from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.stages.small_run import Nothing

from circuitmill.core.calibration import channel_constants, entropy_curve, step_for, step_grid
from circuitmill.core.codecs import Channels, standardised
from circuitmill.errors import StoreError
from circuitmill.stores.calibration import CALIBRATION, Calibration, PlaceCalibration
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest


def sample(seed: int) -> torch.Tensor:
    return (1 + seed) * torch.randn(200, 2, 12, generator=torch.Generator().manual_seed(seed)) + seed


@pytest.fixture
def calibration() -> Calibration:
    return Calibration({"inputs": PlaceCalibration.of(sample(0)), "outputs": PlaceCalibration.of(sample(4))})


def written(calibration: Calibration, folder: Path) -> Manifest:
    output = StageOutput("calibrate", Nothing(), {}, folder)
    calibration.save(output)
    output.finish({})
    return load_manifest(folder / "manifest.json", "calibrate")


def test_constants_come_from_the_sample() -> None:
    x = sample(4)
    place = PlaceCalibration.of(x)
    center, scale = channel_constants(x)
    assert torch.equal(place.center, center) and torch.equal(place.scale, scale)
    u = standardised(x, Channels(center, scale, torch.ones(2)))
    torch.testing.assert_close(u.std(), torch.tensor(1.0), rtol=0.1, atol=0)
    assert torch.equal(place.bits, entropy_curve(u))


def test_channels_have_the_step_of_the_bits_asked_for() -> None:
    place = PlaceCalibration.of(sample(0))
    coarse, fine = place.channels(3.0), place.channels(5.0)
    assert torch.equal(coarse.center, place.center) and torch.equal(fine.scale, place.scale)
    assert torch.equal(fine.step, step_for(5.0, place.bits))
    torch.testing.assert_close(coarse.step / fine.step, torch.full((2,), 4.0), rtol=0.1, atol=0)


def test_what_is_read_is_what_was_written(calibration: Calibration, tmp_path: Path) -> None:
    read = Calibration.load(written(calibration, tmp_path))
    assert set(read.places) == {"inputs", "outputs"}
    for place, expected in calibration.places.items():
        for name in ("center", "scale", "bits"):
            assert torch.equal(getattr(read.places[place], name), getattr(expected, name)), (place, name)


def test_the_file_says_what_its_steps_are(calibration: Calibration, tmp_path: Path) -> None:
    written(calibration, tmp_path)
    tensors = load_file(tmp_path / CALIBRATION)
    assert set(tensors) == {"steps"} | {f"{p}_{n}" for p in ("inputs", "outputs") for n in ("center", "scale", "bits")}
    assert torch.equal(tensors["steps"], step_grid())
    assert tensors["inputs_bits"].shape == (2, len(step_grid()))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_every_flipped_byte_is_found(calibration: Calibration, tmp_path: Path) -> None:
    manifest = written(calibration, tmp_path)
    path = tmp_path / CALIBRATION
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"sha256(.|\n)*calibration\.safetensors"):
            Calibration.load(manifest)


@pytest.mark.parametrize("missing", ["inputs_bits", "outputs_center"])
def test_a_file_without_a_part_is_refused(calibration: Calibration, tmp_path: Path, missing: str) -> None:
    written(calibration, tmp_path)
    tensors = load_file(tmp_path / CALIBRATION)
    del tensors[missing]
    output = StageOutput("calibrate", Nothing(1), {}, tmp_path / "other")
    save_file(tensors, output.path(CALIBRATION))
    with pytest.raises(StoreError, match=rf"center, scale and bits of inputs(.|\n)*{missing}(.|\n)*rerun stage calib"):
        Calibration.load(output.finish({}))


def test_something_else_under_its_name_is_refused(tmp_path: Path) -> None:
    output = StageOutput("calibrate", Nothing(), {}, tmp_path)
    output.path(CALIBRATION).write_bytes(b"\x10 no tensors")
    with pytest.raises(StoreError, match=r"center, scale and bits(.|\n)*SafetensorError"):
        Calibration.load(output.finish({}))
