"""Random transcoders of every architecture, and how they are compared."""

import dataclasses
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core.transcoder import CLT, Transcoder

REPOSITORY = Path(__file__).resolve().parents[2]

ROWS = {
    "clt": CLT,
    "clt skip": ArchitectureConfig(skip=True),
    "plt": ArchitectureConfig("plt"),
    "plt skip": ArchitectureConfig("plt", skip=True),
    "acausal": ArchitectureConfig("acausal"),
    "sae": ArchitectureConfig("sae"),
    "crosscoder": ArchitectureConfig("crosscoder"),
    "crosscoder models": ArchitectureConfig("crosscoder", models=2),
    "crosscoder shared": ArchitectureConfig("crosscoder", models=2, shared=1),
    "molt": ArchitectureConfig("molt", ranks=(2, 1)),
    "molt skip": ArchitectureConfig("molt", ranks=(3,), skip=True),
    "target": ArchitectureConfig(decoder="target"),
    "target pairs": ArchitectureConfig(decoder="target", pair_scale=True, pair_offset=True),
    "target scale": ArchitectureConfig("acausal", decoder="target", pair_scale=True),
    "source": ArchitectureConfig(decoder="source"),
    "source scale": ArchitectureConfig(decoder="source", pair_scale=True),
    "source offset": ArchitectureConfig(decoder="source", pair_offset=True),
    "source pairs": ArchitectureConfig("acausal", decoder="source", pair_scale=True, pair_offset=True, skip=True),
    "low rank": ArchitectureConfig(decoder="low_rank", rank=2),
    "low rank acausal": ArchitectureConfig("acausal", decoder="low_rank", rank=1),
}
"""Every topology, form of decoder and switch."""


def sizes_of(
    form: ArchitectureConfig, n_layers: int = 2, n_features: int = 3, d_model: int = 3
) -> tuple[int, int, int]:
    """Sizes near these that fit the architecture."""
    unit = 2 ** len(form.ranks) - 1 if form.ranks else 1
    return n_layers * form.models, max(n_features // unit, 1) * unit, d_model


def random_transcoder(
    n_layers: int, n_features: int, d_model: int, seed: int = 0, architecture: ArchitectureConfig = CLT
) -> Transcoder:
    """All parameters random, in double precision; about a third of all places fire."""
    torch.manual_seed(seed)
    coder = Transcoder(n_layers, n_features, d_model, architecture).double()
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
        coder.log_threshold.mul_(0.3).sub_(1)
    return coder


def small(row: str, **sizes: int) -> Transcoder:
    """A random transcoder of one row."""
    return random_transcoder(*sizes_of(ROWS[row], **sizes), architecture=ROWS[row])


def tokens_for(coder: Transcoder, n_tokens: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, coder.n_layers, coder.d_model, dtype=torch.float64, generator=generator)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
"""Layers (of each model), features, d_model, tokens, seed."""


def drawn(form: ArchitectureConfig, shape: tuple[int, int, int, int, int]) -> tuple[Transcoder, torch.Tensor]:
    """A random transcoder of an architecture, and its inputs."""
    *sizes, n_tokens, seed = shape
    coder = random_transcoder(*sizes_of(form, *sizes), seed=seed, architecture=form)
    return coder, tokens_for(coder, n_tokens, seed + 1)


def same_with_gradients(ours, theirs, coder, others=(), atol=1e-8) -> None:
    """Equal values, and equal gradients of a random weighting of them by every parameter."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(7))
    named = dict(coder.named_parameters()) | {str(index): one for index, one in enumerate(others)}
    found = [gradients(value, list(named.values()), upstream) for value in (ours, theirs)]
    for name, one, other in zip(named, *found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def gradients(value, parameters, upstream):
    if not value.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad(
        value, parameters, upstream, allow_unused=True, materialize_grads=True, retain_graph=True
    )


def plain_options(**changes: object) -> dict:
    """`config/train/default.yaml` as plain data, with changes by dotted key (`__` for the dot)."""
    data = yaml.safe_load((REPOSITORY / "config/train/default.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        part = data
        for name in path:
            part = part[name]
        part[last] = value
    return data


def options(coder: Transcoder, **changes: object) -> TrainConfig:
    """Options of a training of this transcoder."""
    architecture = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(coder.architecture).items()
    }
    # features that fire at the start: only a number that is small enough matters here
    small = {"init__l0": coder.n_features / 2, "architecture": architecture, "n_features": coder.n_features}
    return decode(TrainConfig, plain_options(**small, **changes), "train")
