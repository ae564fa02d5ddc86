"""Activations at any hookpoint, of one model or of two that read the same tokens.

`Sites` is what a cache holds, of models that are loaded: called with tokens, it gives what would be stored of them. So
a stage that wants live activations of the kind that a transcoder was trained on needs `load_sites` and no more:

    sites = load_sites(cache_config, toyworld=folder, device=device)
    inputs, outputs = sites(tokens, tokens != sites.bos_id)  # outputs is None unless the hookpoint is mlp
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitmill.config.activations import ActivationsConfig, Hookpoint, Single
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.lm.capture import AllSeen, capture_mlp, keep_rows, require_context, run_hooked
from circuitmill.lm.hookpoints import Site, sites
from circuitmill.lm.load import LanguageModel, load_language_model, require_tokenizer, tokenizer_digest

SECOND = "second."
"""In front of the name of a place of the second model."""

Captured = tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"] | None]


def capture_sites(
    lm: LanguageModel,
    tokens: Int[Tensor, "sequence pos"],
    hookpoint: Single,
    layers: Sequence[int],
    keep: Bool[Tensor, "sequence pos"] | None = None,
) -> Float[Tensor, "... layer d_model"]:
    """Run the model and keep what is at a hookpoint of some layers.

    The forward pass ends at the last of them. The hooks are removed whatever happens.

    Args:
        lm: The model.
        tokens: What it reads.
        hookpoint: Where in a block.
        layers: Which blocks, lowest first.
        keep: Positions that are wanted; None for all.

    Returns:
        In the model's precision, on its device: [sequence pos layer d_model], or with `keep` [token layer d_model] in
        the order of the positions, where every layer is contiguous for itself.

    Raises:
        ConfigError: the sequences are longer than the model's context, or its architecture has no such place.
        ShapeError: what is there is not of the model's width.
    """
    n_sequences, length = tokens.shape
    require_context(lm, length)
    seen = (n_sequences, length, lm.d_model)
    wanted = None if keep is None else keep.flatten().nonzero().squeeze(1).to(lm.device)
    rows = seen[:2] if wanted is None else (len(wanted),)
    # one block of memory per layer
    kept = torch.empty(len(layers), *rows, lm.d_model, dtype=lm.model.dtype, device=lm.device)

    def take(index: int, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if value.shape != seen:
            raise ShapeError(
                f"activations of shape {seen} at {hookpoint}",
                found=f"{tuple(value.shape)}",
                where=f"model {lm.name}, layer {layers[index]}",
                fix="this architecture needs its own row in circuitmill/lm/hookpoints.py",
            )
        keep_rows(kept[index], value, wanted)
        if index == len(layers) - 1:
            raise AllSeen

    found = sites(lm.model, hookpoint)
    handles = [_hook(found[layer], lambda value, index=index: take(index, value)) for index, layer in enumerate(layers)]
    run_hooked(lm, tokens, handles)
    return kept.movedim(0, -2)


def _hook(site: Site, take: Callable[[Any], None]) -> torch.utils.hooks.RemovableHandle:
    """Have `take` called with what is at a site."""

    def before(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        take(arguments)

    def after(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        take(output)

    if site.side == "input":
        return site.module.register_forward_pre_hook(before)
    return site.module.register_forward_hook(after)


@dataclass(frozen=True)
class Sites:
    """What a cache holds: a hookpoint of some layers of a model, or the same of two models.

    The axis "layer" of what it gives is the list of `places`: the first model's layers in order, then the second's.
    """

    lms: tuple[LanguageModel, ...]
    hookpoint: Hookpoint
    layers: tuple[tuple[int, ...], ...]
    """Of each model."""

    @property
    def places(self) -> tuple[str, ...]:
        """Their names: `resid_post.0`, ..., `second.resid_post.0`, ..."""
        return tuple(
            f"{prefix}{self.hookpoint}.{layer}"
            for prefix, layers in zip(("", SECOND), self.layers, strict=False)
            for layer in layers
        )

    @property
    def n_layers(self) -> int:
        """How many places."""
        return sum(map(len, self.layers))

    @property
    def d_model(self) -> int:
        """Width of them all."""
        return self.lms[0].d_model

    @property
    def bos_id(self) -> int:
        """The token that caches leave out."""
        return self.lms[0].bos_id

    @property
    def device(self) -> torch.device:
        """Where activations are."""
        return self.lms[0].device

    @property
    def digests(self) -> dict[str, str]:
        """`model_digest`, and with two models `second_model_digest`, as manifests have them."""
        names = ("model_digest", "second_model_digest")
        return {name: lm.digest for name, lm in zip(names, self.lms, strict=False)}

    @property
    def name(self) -> str:
        """Of the model or both, for messages."""
        return " and ".join(lm.name for lm in self.lms)

    def require_tokenizer(self, digest: str, bos_id: int) -> None:
        """Refuse tokens that another tokenizer made; see `load.require_tokenizer`.

        Raises:
            ConfigError: it is not that of the models.
        """
        for lm in self.lms:
            require_tokenizer(lm, digest, bos_id)

    def __call__(self, tokens: Int[Tensor, "sequence pos"], keep: Bool[Tensor, "sequence pos"]) -> Captured:
        """Run the models on some tokens.

        Args:
            tokens: Whole sequences.
            keep: Positions that are wanted: those that do not hold BOS.

        Returns:
            What is read and what is to be written, at the wanted positions in order, on the models' device. The latter
            is None if it is the former. In the models' precision, the finer one if they differ.

        Raises:
            ConfigError: the sequences are longer than a model's context.
            ShapeError: an activation is not of the model's width.
        """
        if self.hookpoint == "mlp":
            return capture_mlp(self.lms[0], tokens, keep)
        parts = [
            capture_sites(lm, tokens, self.hookpoint, layers, keep)
            for lm, layers in zip(self.lms, self.layers, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def mlp_sites(lm: LanguageModel) -> Sites:
    """Inputs and outputs of all MLPs of a model."""
    return Sites((lm,), "mlp", (tuple(range(lm.n_layers)),))


def activations_of(cfg: ActivationsConfig, lms: Sequence[LanguageModel]) -> Sites:
    """The activations that a configuration asks for, of its model or models, which are loaded.

    Args:
        cfg: Of stage cache or calibrate.
        lms: Its model, and its second model if it has one.

    Raises:
        ConfigError: a layer that a model does not have, a hookpoint that its architecture does not have, or two models
            of different widths or tokenizers.
    """
    _require_alike(lms)
    layers = tuple(tuple(range(lm.n_layers)) if cfg.layers is None else cfg.layers for lm in lms)
    for lm, wanted in zip(lms, layers, strict=True):
        if wanted[-1] >= lm.n_layers:
            raise ConfigError(
                f"layers from 0 to {lm.n_layers - 1}, which model {lm.name} has",
                found=str(wanted[-1]),
                where="cache.layers",
                fix="leave it out, or set null to take all",
            )
        if cfg.hookpoint != "mlp":
            sites(lm.model, cfg.hookpoint)
    return Sites(tuple(lms), cfg.hookpoint, layers)


def _require_alike(lms: Sequence[LanguageModel]) -> None:
    first = lms[0]
    for second in lms[1:]:
        for what, ours, theirs in (
            ("d_model", first.d_model, second.d_model),
            ("tokenizer", tokenizer_digest(first.tokenizer)[:12], tokenizer_digest(second.tokenizer)[:12]),
            ("BOS token", first.bos_id, second.bos_id),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"two models of one {what}: that of {first.name} is {ours}",
                    found=f"{theirs} of {second.name}",
                    where="cache.second_model",
                    fix="choose a second model of the same width and tokenizer, such as a fine-tuned one",
                )


def load_sites(
    cfg: ActivationsConfig, *, toyworld: Path | None, device: torch.device, first: LanguageModel | None = None
) -> Sites:
    """Load the model or models of a configuration.

    Args:
        cfg: Of stage cache or calibrate.
        toyworld: Output folder of stage toyworld; needed for the embedded model only.
        device: Where the models run.
        first: `cfg.model` if it is loaded already.

    Raises:
        ConfigError: a model cannot be loaded or has no such place, or the two do not go together.
        StoreError: a weight file is damaged.
        UpstreamError: the embedded model is asked for without its stage's output.
    """
    lms = [load_language_model(cfg.model, toyworld=toyworld, device=device) if first is None else first]
    if cfg.second_model is not None:
        lms.append(load_language_model(cfg.second_model, toyworld=toyworld, device=device))
    return activations_of(cfg, lms)
