"""A finished cross-layer transcoder on disk, in circuit-tracer's own layout.

    W_enc_{l}.safetensors   W_enc_{l} [feature d_model]   b_enc_{l} [feature]   b_dec_{l} [d_model]
    threshold_{l} [feature] W_dec_{l}.safetensors   W_dec_{l} [feature target d_model], target k is layer l +
    k config.yaml             model_kind, feature_input_hook, feature_output_hook, model_name, scan

for l = 0 .. n_layers - 1. All scales are folded in: the model reads raw MLP inputs and writes raw MLP outputs. The
reader there takes the number of encoder files for the number of layers, so a leftover file of another model
would change the model; here it is an error.
"""

import re
from pathlib import Path

import torch
import yaml

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import StoreError
from circuitmill.stores.tensors import check_floating, read_tensors, write_tensors

CONFIG = "config.yaml"
MODEL_KIND = "cross_layer_transcoder"
FEATURE_INPUT = "mlp.hook_in"
FEATURE_OUTPUT = "mlp.hook_out"
_NUMBERED = re.compile(r"W_(enc|dec)_(\d+)\.safetensors")


def save_clt(folder: Path, transcoder: Transcoder, *, scan: str, model_name: str) -> None:
    """Write a transcoder with its scales folded in; files of an earlier one in the same folder go away.

    Args:
        scan: Name under which a viewer looks for the features' descriptions.
        model_name: Name of the language model it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("W_*.safetensors"):
        old.unlink()
    for layer in range(transcoder.n_layers):
        write_tensors(
            folder / f"W_enc_{layer}.safetensors",
            {
                f"W_enc_{layer}": transcoder.W_enc[layer],
                f"b_enc_{layer}": transcoder.b_enc[layer],
                f"b_dec_{layer}": transcoder.b_dec[layer],
                f"threshold_{layer}": transcoder.threshold[layer],
            },
        )
        write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": transcoder.W_dec[layer]})
    config = {
        "model_kind": MODEL_KIND,
        "feature_input_hook": FEATURE_INPUT,
        "feature_output_hook": FEATURE_OUTPUT,
        "model_name": model_name,
        "scan": scan,
    }
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@torch.no_grad()
def load_clt(folder: Path) -> Transcoder:
    """Read a JumpReLU transcoder, in float32 whatever type the files have, without gradients.

    Raises:
        StoreError: a file is missing, damaged, left over, or has another shape than the first layer implies;
        names it.
    """
    _check_config(folder / CONFIG)
    n_layers = _count_layers(folder)
    first = read_tensors(folder / "W_enc_0.safetensors")
    if "W_enc_0" not in first or first["W_enc_0"].ndim != 2:
        raise StoreError(
            "expected a tensor W_enc_0 [feature d_model]",
            found=str({name: tuple(tensor.shape) for name, tensor in first.items()}),
            where=folder / "W_enc_0.safetensors",
            fix="save the model in circuit-tracer's layout for cross-layer transcoders",
        )
    n_features, d_model = first["W_enc_0"].shape
    transcoder = Transcoder(n_layers, n_features, d_model)
    for layer in range(n_layers):
        path = folder / f"W_enc_{layer}.safetensors"
        shapes = {
            "W_enc": (n_features, d_model),
            "b_enc": (n_features,),
            "b_dec": (d_model,),
            "threshold": (n_features,),
        }
        tensors = read_tensors(path, {f"{name}_{layer}": shape for name, shape in shapes.items()})
        check_floating(tensors, path)
        threshold = tensors[f"threshold_{layer}"]
        if not (threshold >= 0).all():
            raise StoreError(
                f"expected values of at least zero in threshold_{layer}",
                found=f"{threshold.min().item():g}",
                where=path,
                fix="only transcoders with a ReLU or with JumpReLU's positive thresholds can be loaded",
            )
        transcoder.W_enc[layer] = tensors[f"W_enc_{layer}"]
        transcoder.b_enc[layer] = tensors[f"b_enc_{layer}"]
        transcoder.b_dec[layer] = tensors[f"b_dec_{layer}"]
        transcoder.log_threshold[layer] = threshold.float().log()
        path = folder / f"W_dec_{layer}.safetensors"
        tensors = read_tensors(path, {f"W_dec_{layer}": (n_features, n_layers - layer, d_model)})
        check_floating(tensors, path)
        transcoder.W_dec[layer].copy_(tensors[f"W_dec_{layer}"])
    return transcoder.requires_grad_(False)


def _count_layers(folder: Path) -> int:
    """Number of layers, if encoder and decoder files are numbered 0 .. n - 1 and nothing else lies beside them."""
    numbers: dict[str, set[int]] = {"enc": set(), "dec": set()}
    for path in sorted(folder.glob("*.safetensors")):
        match = _NUMBERED.fullmatch(path.name)
        if match is None:
            raise StoreError(
                "expected W_enc_<layer>.safetensors and W_dec_<layer>.safetensors only",
                found=path.name,
                where=folder,
                fix="remove the file; it is not part of the model",
            )
        numbers[match[1]].add(int(match[2]))
    n_layers = max(len(numbers["enc"]), len(numbers["dec"]), 1)
    for side, found in numbers.items():
        for layer in range(n_layers):
            if layer not in found:
                raise StoreError(
                    f"expected {n_layers} {side}oder files numbered from 0",
                    found=f"{len(found)}, without W_{side}_{layer}.safetensors",
                    where=folder,
                    fix="remove files of another model or rerun the stage",
                )
    return n_layers


def _check_config(path: Path) -> None:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StoreError(
            "expected a YAML file that describes the transcoder",
            found=str(error),
            where=path,
            fix="rerun the stage train",
        ) from error
    kind = config.get("model_kind") if isinstance(config, dict) else None
    if kind != MODEL_KIND:
        raise StoreError(
            f"expected model_kind: {MODEL_KIND}",
            found=str(kind),
            where=path,
            fix="load a cross-layer transcoder",
        )
