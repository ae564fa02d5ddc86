"""What a notebook needs: load a finished transcoder, run it on activations, put it into a language model.

    import circuitmill

    clt = circuitmill.load("results/demo/main/train")
    x, y = circuitmill.activations(model, tokens)           # MLP inputs and outputs, [token layer d_model]
    a = clt.encode(x)                                       # activations, [token source feature]
    y_hat = clt.decode(a, x)                                # the same as clt(x)
    with circuitmill.replaced(model, clt):
        logits = model(tokens)

`load` gives the object that every stage works with, `core.transcoder.Transcoder`. A model is one of Hugging Face's or a
TransformerLens `HookedTransformer`, loaded without processing of its weights: folding the norms' gains into the MLPs
changes what MLPs read.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError, StoreError
from circuitmill.lm.hookpoints import mlps
from circuitmill.lm.replacement import Reconstruction, outputs_substituted
from circuitmill.stores.transcoders import ARCHITECTURE, load_transcoder

Pair = tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Transcoder:
    """Load a finished transcoder: it reads raw activations and writes raw ones, in float32.

    Args:
        path: Of the output of stage train (its folder or its manifest.json), or of a folder with a transcoder: ours, or
            a cross-layer transcoder in circuit-tracer's layout.

    Raises:
        StoreError: there is none, or a file is damaged; names it.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == "manifest.json" else folder
    for candidate in (folder / "model", folder):
        if (candidate / ARCHITECTURE).is_file() or (candidate / "config.yaml").is_file():
            return load_transcoder(candidate).to(device)
    raise StoreError(
        f"a transcoder: {ARCHITECTURE}, or config.yaml in circuit-tracer's layout",
        found="neither",
        where=folder,
        fix="give the folder results/<run>/<variant>/train, its manifest.json or the folder model in it",
    )


def activations(model: Any, tokens: Int[Tensor, "sequence pos"]) -> Pair:
    """MLP inputs and outputs of a model, in float32, one sequence after the other.

    Transcoders of this package are trained without BOS; leave its rows out where that matters.

    Raises:
        ConfigError: an architecture whose MLPs are not known.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[layer] = arguments[0].flatten(0, 1).float(), output.flatten(0, 1).float()

        return hook

    modules = _mlps(model)
    handles = [module.register_forward_hook(keep(layer)) for layer, module in enumerate(modules)]
    try:
        with torch.no_grad():
            model(tokens.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    x, y = (torch.stack([seen[layer][side] for layer in range(len(modules))], dim=1) for side in (0, 1))
    return x, y


@contextmanager
def replaced(
    model: Any, transcoder: Transcoder, *, layers: Collection[int] | None = None, bos_id: int | None = None
) -> Iterator[None]:
    """Let a transcoder stand for the model's MLPs while the block runs; gradients pass through it.

    Args:
        model: Called as usual inside; the transcoder must be on its device.
        layers: Replace these MLPs only; features of the others still write to them. All if None.
        bos_id: At these tokens the model keeps its own MLP outputs, as in stage evaluate. None keeps none.

    Raises:
        ShapeError: the transcoder was made for a model of another shape, or does not replace MLPs.
        ConfigError: an architecture whose MLPs are not known.
    """
    modules = _mlps(model)
    if transcoder.n_layers != len(modules) or not transcoder.topology.reads_one or transcoder.architecture.reproduces:
        raise ShapeError(
            f"a transcoder of the MLPs of {len(modules)} layers",
            found=f"topology {transcoder.architecture.topology} over {transcoder.n_layers} layers",
            where="transcoder",
            fix="use the model that the transcoder was trained on",
        )
    keeps: dict[str, Tensor] = {}

    def note(_module: nn.Module, arguments: tuple, options: dict) -> None:
        tokens = options.get("input_ids", options.get("input", arguments[0] if arguments else None))
        if bos_id is not None:
            keeps["mask"] = (tokens == bos_id)[..., None]

    watching = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with outputs_substituted(modules, Reconstruction(transcoder), layers, lambda: keeps.get("mask")):
            yield
    finally:
        watching.remove()


def _mlps(model: Any) -> list[nn.Module]:
    """The MLP modules of a Hugging Face model or of a HookedTransformer."""
    if hasattr(model, "blocks") and hasattr(model, "hook_dict"):
        return [block.mlp for block in model.blocks]
    return mlps(model)
