"""The constants of the codecs as a file: what stage calibrate measured.

`calibration.safetensors` holds, for place inputs and, if they are something else, outputs,

    <place>_center  float32 [layer d_model]  median
    <place>_scale   float32 [layer d_model]  half the distance from the 16th to the 84th percentile, floored
    <place>_bits    float32 [layer step]     entropy of a number quantised with each step
    steps           float32 [step]           those steps, in units of scale
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from circuitmill.core.calibration import channel_constants, entropy_curve, step_for, step_grid
from circuitmill.core.codecs import Channels, standardised
from circuitmill.errors import StoreError
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import Manifest, StageOutput

CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class PlaceCalibration:
    """What was measured of one place."""

    center: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, "layer d_model"]
    bits: Float[Tensor, "layer step"]

    @classmethod
    def of(cls, sample: Float[Tensor, "token layer d_model"]) -> "PlaceCalibration":
        """Constants from a sample of tokens."""
        center, scale = channel_constants(sample)
        channels = Channels(center, scale, torch.ones(len(center)))
        return cls(center, scale, entropy_curve(standardised(sample, channels)))

    def channels(self, bits: float) -> Channels:
        """The codec's constants.

        Args:
            bits: Of a number, with codec entropy.
        """
        return Channels(self.center, self.scale, step_for(bits, self.bits))


@dataclass(frozen=True)
class Calibration:
    """What was measured of a model, by place."""

    places: dict[str, PlaceCalibration]
    """Inputs, and outputs unless what is read is what is reconstructed."""

    def save(self, output: StageOutput) -> None:
        """Write the file into a stage's folder."""
        tensors = {"steps": step_grid()}
        for place, entry in self.places.items():
            tensors |= {f"{place}_center": entry.center, f"{place}_scale": entry.scale, f"{place}_bits": entry.bits}
        atomic_write(output.path(CALIBRATION), save({key: value.contiguous() for key, value in tensors.items()}))

    @classmethod
    def load(cls, manifest: Manifest) -> "Calibration":
        """Read what stage calibrate wrote.

        Raises:
            StoreError: the file is damaged.
        """
        path = manifest.checked_file(CALIBRATION)
        try:
            tensors = load(path.read_bytes())
            places = ("inputs", "outputs") if any(name.startswith("outputs_") for name in tensors) else ("inputs",)
            return cls(
                {
                    place: PlaceCalibration(*(tensors[f"{place}_{name}"] for name in ("center", "scale", "bits")))
                    for place in places
                }
            )
        except (SafetensorError, KeyError) as error:
            raise StoreError(
                "center, scale and bits of inputs and outputs",
                found=f"{type(error).__name__}: {error}",
                where=path,
                fix="rerun stage calibrate",
            ) from error
