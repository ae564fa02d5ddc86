"""A finished transcoder on disk, whatever its architecture; all scales are folded in.

A cross-layer transcoder with a decoder per source and target is written in circuit-tracer's own layout
(`stores/clt.py`), every other as

    architecture.yaml          format, n_layers, n_features, d_model, architecture, model_name, scan
    transcoder.safetensors     parameters by name; `threshold` [source feature] in place of its logarithm

Thresholds of zero are those of a ReLU.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.decode import decode
from circuitmill.core.transcoder import CLT, Transcoder
from circuitmill.errors import ConfigError, StoreError
from circuitmill.stores.clt import CONFIG, load_clt, save_clt
from circuitmill.stores.tensors import check_floating, read_tensors, write_tensors

FORMAT = 1
ARCHITECTURE, TENSORS = "architecture.yaml", "transcoder.safetensors"
MODEL, TRACED = "model", "circuit_tracer"
"""Folders of stage train: the transcoder; the same in circuit-tracer's layout, if it is another that can be traced."""
_SIZES = ("n_layers", "n_features", "d_model")
_FIX = "rerun the stage train"


def save_transcoder(folder: Path, transcoder: Transcoder, *, scan: str, model_name: str) -> None:
    """Write a transcoder; files of an earlier one in the same folder go away.

    Args:
        scan: Name under which a viewer looks for the features' descriptions.
        model_name: Name of the language model it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / ARCHITECTURE, folder / TENSORS, folder / "config.yaml", *folder.glob("W_*.safetensors")):
        old.unlink(missing_ok=True)
    if is_plain_clt(transcoder):
        save_clt(folder, transcoder, scan=scan, model_name=model_name)
        return
    tensors = {name: parameter.detach() for name, parameter in transcoder.named_parameters()}
    tensors["threshold"] = tensors.pop("log_threshold").exp()
    write_tensors(folder / TENSORS, tensors)
    description = {
        "format": FORMAT,
        **{name: getattr(transcoder, name) for name in _SIZES},
        "architecture": _as_yaml(transcoder.architecture),
        "model_name": model_name,
        "scan": scan,
    }
    (folder / ARCHITECTURE).write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")


def is_plain_clt(transcoder: Transcoder) -> bool:
    """Whether circuit-tracer's own layout holds it as it is; Matryoshka prefixes matter while training only."""
    return replace(transcoder.architecture, prefixes=()) == CLT


def _as_yaml(architecture: ArchitectureConfig) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(architecture).items()}


@torch.no_grad()
def load_transcoder(folder: Path) -> Transcoder:
    """Read a transcoder, in float32 whatever type the files have, without gradients.

    Raises:
        StoreError: a file is missing, damaged or left over, or does not fit the architecture; names it.
    """
    path = folder / ARCHITECTURE
    if not path.is_file():
        return load_clt(folder)
    transcoder = _described(path)
    path = folder / TENSORS
    parameters = dict(transcoder.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    shapes["threshold"] = shapes.pop("log_threshold")
    tensors = read_tensors(path, shapes)
    check_floating(tensors, path)
    threshold = tensors.pop("threshold").float()
    if not (threshold >= 0).all():
        raise StoreError(
            "expected thresholds of at least zero",
            found=f"{threshold.min().item():g}",
            where=path,
            fix="train the transcoder again",
        )
    parameters["log_threshold"].copy_(threshold.log())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return transcoder.requires_grad_(False)


def read_architecture(folder: Path) -> ArchitectureConfig:
    """What a transcoder looks like, without reading its parameters.

    Raises:
        StoreError: the description is damaged.
    """
    path = folder / ARCHITECTURE
    return _description(path)[1] if path.is_file() else CLT


def circuit_tracer_folder(train: Path) -> Path:
    """Where stage train left a transcoder that can be traced in circuit-tracer's layout.

    Args:
        train: Folder of the stage.
    """
    return train / (TRACED if (train / MODEL / ARCHITECTURE).is_file() else MODEL)


def _described(path: Path) -> Transcoder:
    """A transcoder of zeros of the architecture that a file describes."""
    found, architecture = _description(path)
    try:
        n_layers, n_features, d_model = (int(found[name]) for name in _SIZES)
        return Transcoder(n_layers, n_features, d_model, architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise _no_description(path, error) from error


def _description(path: Path) -> tuple[dict[str, Any], ArchitectureConfig]:
    """Content of a description as it stands, and the architecture in it."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise StoreError(f"format {FORMAT}", found=found["format"], where=path, fix=_FIX)
        return found, decode(ArchitectureConfig, found["architecture"], "architecture")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise _no_description(path, error) from error


def _no_description(path: Path, error: Exception) -> StoreError:
    return StoreError("a description of a transcoder", found=str(error), where=path, fix=_FIX)


@torch.no_grad()
def as_clt(transcoder: Transcoder) -> Transcoder:
    """The same function as a cross-layer transcoder with a decoder per source and target, for circuit-tracer.

    Raises:
        ConfigError: no such transcoder exists.
    """
    _require_traceable(transcoder.architecture)
    clt = Transcoder(transcoder.n_layers, transcoder.n_features, transcoder.d_model)
    for name in ("W_enc", "b_enc", "b_dec", "log_threshold"):
        getattr(clt, name).copy_(getattr(transcoder, name))
    for source, targets in enumerate(transcoder.topology.writes):
        block = transcoder.decoder_block(source)
        for index, target in enumerate(targets):
            clt.W_dec[source][:, target - source] = block[:, index]
    return clt.requires_grad_(False)


def _require_traceable(architecture: ArchitectureConfig) -> None:
    reason = architecture.untraceable
    if reason:
        raise ConfigError(
            "a transcoder that can be traced",
            found=reason,
            where="train.architecture",
            fix="use topology clt or plt without skip and pair_offset",
        )


def export_clt(folder: Path, out: Path) -> None:
    """Write a finished transcoder in circuit-tracer's layout, with its labels.

    Args:
        folder: With the transcoder.
        out: A new or empty folder.

    Raises:
        ConfigError: no cross-layer transcoder is the same function.
        StoreError: the transcoder is damaged, or the folder holds something.
    """
    _require_traceable(read_architecture(folder))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError("a new or empty folder", found="something in it", where=out, fix="name another --out")
    transcoder = load_transcoder(folder)
    description = folder / (ARCHITECTURE if (folder / ARCHITECTURE).is_file() else CONFIG)
    labels = yaml.safe_load(description.read_text(encoding="utf-8"))
    save_clt(out, as_clt(transcoder), scan=str(labels.get("scan", "")), model_name=str(labels.get("model_name", "")))


def read_decoder(folder: Path, source: int) -> Float[Tensor, "feature target d_model"]:
    """What the features of one source write; without reading the rest of a plain cross-layer transcoder.

    Raises:
        StoreError: the file is missing, damaged, or holds something else.
    """
    if (folder / ARCHITECTURE).is_file():
        return load_transcoder(folder).decoder_block(source)
    path, name = folder / f"W_dec_{source}.safetensors", f"W_dec_{source}"
    tensors = read_tensors(path)
    check_floating(tensors, path)
    if set(tensors) != {name} or tensors[name].ndim != 3:
        raise StoreError(
            f"expected one tensor {name} [feature target d_model]",
            found=str({key: tuple(tensor.shape) for key, tensor in tensors.items()}),
            where=path,
            fix="rerun the stage train",
        )
    return tensors[name]
