"""The transcoder: features read activations at some layers and write to others, few of them at a time.

    h^s = sum over layers l that s reads of W_enc^{s,l} x^l + b_enc^s,   a^s = h^s if h^s > threshold^s else 0,
    yhat^m = b_dec^m + sum over sources s that write to m of W_dec^{s->m} a^s   (+ W_skip^m x^m)

Which source reads and writes what is the topology (`core.topology`), the form of W_dec a decoder (`core.decoders`).
With the default architecture this is the cross-layer transcoder of "Circuit Tracing" (Ameisen et al. 2025, section
"Building an interpretable replacement model"): source l reads layer l and writes to layers l, l + 1, ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.decoders import ALL, Decoder, LowRank, SharedOverModels, SourceTied, TargetTied, Untied
from circuitmill.core.mixture import Mixture
from circuitmill.core.nonlinearity import jumprelu
from circuitmill.core.operand import Dense
from circuitmill.core.topology import Topology, make_topology
from circuitmill.errors import ConfigError, ShapeError

CLT = ArchitectureConfig()
"""A cross-layer transcoder with a decoder per source and target."""


class Transcoder(nn.Module):
    """Encoders, thresholds and decoders; all parameters are zero until an initialiser or a store fills them.

    Parameters: W_enc [read feature d_model] with a row for every (source, layer it reads), which is
    [layer feature d_model] where every source reads its own layer; b_enc and log_threshold [source feature]; those of
    the decoder; b_dec [layer d_model]; W_skip [layer d_model d_model] if the architecture has it. The logarithm of the
    threshold is the parameter, which keeps the threshold positive; a ReLU has minus infinity there.

    >>> clt = Transcoder(n_layers=2, n_features=3, d_model=4)
    >>> clt.decode(clt.encode(torch.ones(5, 2, 4))).shape
    torch.Size([5, 2, 4])

    Raises:
        ShapeError: a size is not positive, or layers cannot be divided among the models.
        ConfigError: the architecture does not fit the number of features.
    """

    def __init__(
        self,
        n_layers: int,
        n_features: int,
        d_model: int,
        architecture: ArchitectureConfig = CLT,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n_layers", n_layers), ("n_features", n_features), ("d_model", d_model)):
            if size < 1:
                raise ShapeError(
                    "expected a size of at least 1", found=str(size), where=name, fix="choose a positive size"
                )
        if n_layers % architecture.models:
            raise ShapeError(
                f"as many layers of each of {architecture.models} models",
                found=f"{n_layers} layers",
                where="architecture.models",
                fix="cache the same layers of every model",
            )
        architecture.check(n_features)
        self.architecture = architecture
        self.topology = make_topology(architecture.topology, n_layers)
        self.n_layers, self.n_sources = n_layers, self.topology.n_sources
        self.n_features, self.d_model = n_features, d_model
        n_reads = sum(len(reads) for reads in self.topology.reads)
        self.W_enc = nn.Parameter(torch.zeros(n_reads, n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(self.n_sources, n_features))
        self.decoder = make_decoder(architecture, self.topology, n_features, d_model)
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        self.log_threshold = nn.Parameter(torch.zeros(self.n_sources, n_features))
        self.W_skip = nn.Parameter(torch.zeros(n_layers, d_model, d_model)) if architecture.skip else None
        if device is not None:
            self.to(device)

    @property
    def W_dec(self) -> nn.ParameterList:
        """Decoder vectors [feature target d_model] per source; target k of source s of a CLT is layer s + k.

        Raises:
            ShapeError: the decoders have another form; `decoder_block` makes vectors of most.
        """
        if type(self.decoder) is not Untied:
            raise ShapeError(
                "a decoder per source and target",
                found=type(self.decoder).__name__,
                where="W_dec",
                fix="use decoder_block",
            )
        return self.decoder.W_dec

    def feature_axes(self) -> dict[str, int | None]:
        """Axis along which each parameter lists the features of a source; None for one that has no such axis.

        Raises:
            ShapeError: features cannot be divided among processes by stretches.
        """
        own: dict[str, int | None] = {"W_enc": 1, "b_enc": 1, "log_threshold": 1}
        decoder = {f"decoder.{name}": axis for name, axis in self.decoder.feature_axes().items()}
        return {name: (own | decoder).get(name) for name, _ in self.named_parameters()}

    @property
    def threshold(self) -> Float[Tensor, "source feature"]:
        """What a pre-activation must exceed for the feature to fire; in units of the pre-activation."""
        return self.log_threshold.exp()

    def pre_activations(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token source feature"]:
        """Read every source's layers with its encoders, before the nonlinearity."""
        if self.topology.reads_one:
            return (
                einsum(x, self.W_enc, "token layer d_model, layer feature d_model -> token layer feature") + self.b_enc
            )
        return torch.stack([self.pre_activations_source(source, x) for source in range(self.n_sources)], dim=1)

    def pre_activations_source(
        self, source: int, x: Float[Tensor, "token layer d_model"], features: slice = ALL
    ) -> Float[Tensor, "token feature"]:
        """As `pre_activations`, for one source's features or a block of them."""
        inputs = [x[:, layer] for layer in self.topology.reads[source]]
        weights = [self.W_enc[row, features] for row in self.topology.encoders(source)]
        return read(inputs, weights, self.b_enc[source, features])

    def pre_activations_layer(
        self, layer: int, x: Float[Tensor, "token d_model"], features: slice = ALL
    ) -> Float[Tensor, "token feature"]:
        """As `pre_activations_source`, from the one layer that the source reads.

        Raises:
            ShapeError: sources read several layers.
        """
        if not self.topology.reads_one:
            raise ShapeError(
                "features that read one layer",
                found=f"topology {self.architecture.topology}",
                where=f"layer {layer}",
                fix="use pre_activations_source with the activations of all layers",
            )
        return read([x], [self.W_enc[layer, features]], self.b_enc[layer, features])

    def encode(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token source feature"]:
        """Activations of all features: the pre-activation where it exceeds the threshold, else zero."""
        return jumprelu(self.pre_activations(x), self.log_threshold)

    def encode_source(
        self, source: int, x: Float[Tensor, "token layer d_model"], features: slice = ALL
    ) -> Float[Tensor, "token feature"]:
        """Activations of one source's features, or of a block of them, without computing the others."""
        return jumprelu(self.pre_activations_source(source, x, features), self.log_threshold[source, features])

    def encode_layer(
        self, layer: int, x: Float[Tensor, "token d_model"], features: slice = ALL
    ) -> Float[Tensor, "token feature"]:
        """As `encode_source`, from the one layer that the source reads.

        Args:
            features: Which of the layer's features; the output's feature axis has the slice's length.
        """
        return jumprelu(self.pre_activations_layer(layer, x, features), self.log_threshold[layer, features])

    def decode_layer(
        self, source: int, a: Float[Tensor, "token feature"], x: Float[Tensor, "token d_model"] | None = None
    ) -> Float[Tensor, "token target d_model"]:
        """What one source's features write to its targets, without decoder bias and skip connection.

        Args:
            x: What the source read; only a mixture of transforms needs it.
        """
        return self.decoder.written(source, Dense(a), x)

    def decode(
        self,
        a: Float[Tensor, "token source feature"],
        x: Float[Tensor, "token layer d_model"] | None = None,
    ) -> Float[Tensor, "token layer d_model"]:
        """Add up what every feature writes, the decoder biases and what skips the features.

        Args:
            x: What was encoded; only a skip connection and a mixture of transforms need it.

        Raises:
            ShapeError: it is needed and missing.
        """
        written = [
            self.decode_layer(source, a[:, source], None if x is None else x[:, source])
            for source in range(self.n_sources)
        ]
        return self.add_up(written, x)

    def add_up(
        self, written: list[Float[Tensor, "token _ d_model"]], x: Float[Tensor, "token layer d_model"] | None = None
    ) -> Float[Tensor, "token layer d_model"]:
        """Sum what each source wrote (`decode_layer`, in order of sources) into the layers it wrote to, with biases.

        Args:
            x: What was encoded; only a skip connection needs it.

        Raises:
            ShapeError: it is needed and missing.
        """
        return self.with_biases(self.collected(written), x)

    def collected(self, written: Sequence[Float[Tensor, "token _ d_model"]]) -> Float[Tensor, "token layer d_model"]:
        """Sum what each source wrote into the layers it wrote to; sources in order."""
        places = tuple(_as_slice(targets) for targets in self.topology.writes)
        return _Collected.apply(places, self.n_layers, *written)

    def with_biases(
        self, written: Float[Tensor, "token layer d_model"], x: Float[Tensor, "token layer d_model"] | None = None
    ) -> Float[Tensor, "token layer d_model"]:
        """Add decoder biases and what skips the features to what all features write to each layer.

        Args:
            x: What was encoded; only a skip connection needs it.

        Raises:
            ShapeError: it is needed and missing.
        """
        if self.W_skip is None:
            return written + self.b_dec
        if x is None:
            raise ShapeError(
                "what the skip connection reads",
                found="activations alone",
                where="decode",
                fix="pass the MLP inputs x too",
            )
        skipped = einsum(x, self.W_skip, "token layer d_model, layer row d_model -> token layer row")
        return written + self.b_dec + skipped

    def skip_layer(self, layer: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """W_skip x of one layer; zero without a skip connection."""
        return torch.zeros_like(x) if self.W_skip is None else x @ self.W_skip[layer].T

    def forward(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Reconstruct the outputs of all layers from the inputs of all layers."""
        return self.decode(self.encode(x), x)

    def decoder_block(self, source: int, features: slice = ALL) -> Float[Tensor, "feature target d_model"]:
        """Decoder vectors of a source's features.

        Raises:
            ShapeError: what the features write is not a vector times the activation.
        """
        return self.decoder.block(source, features)

    def decoder_norms(self, kind: str = "concatenated") -> Float[Tensor, "source feature"]:
        """What each feature writes: length of its decoder vectors put one after the other.

        Args:
            kind: "concatenated", or "summed" for the sum of the lengths instead.

        Raises:
            ConfigError: another kind.
        """
        return torch.stack([self.decoder_norm(source, kind) for source in range(self.n_sources)])

    def decoder_norm(self, source: int, kind: str = "concatenated") -> Float[Tensor, " feature"]:
        """As `decoder_norms`, of one source.

        Raises:
            ConfigError: another kind.
        """
        if kind not in ("concatenated", "summed"):
            raise ConfigError("concatenated or summed", found=repr(kind), where="norm", fix="name one of them")
        return self.decoder.norms(source) if kind == "concatenated" else self.decoder.target_norms(source).sum(dim=1)


def read(
    inputs: Sequence[Float[Tensor, "token d_model"]],
    weights: Sequence[Float[Tensor, "feature d_model"]],
    bias: Float[Tensor, " feature"],
) -> Float[Tensor, "token feature"]:
    """Pre-activations of some features from all layers that they read."""
    # einsum(x, W_enc, "token d_model, feature d_model -> token feature") + b_enc, over the layers
    pre = nn.functional.linear(inputs[0], weights[0], bias)
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        pre = pre + x @ weight.T
    return pre


class _Collected(torch.autograd.Function):
    """Sums of stretches of layers in place; the gradient of each summand is a part of that of the sum, not a copy."""

    @staticmethod
    def forward(ctx: Any, places: tuple[slice | list[int], ...], n_layers: int, *written: Tensor) -> Tensor:
        ctx.places = places
        n_tokens, _, d_model = written[0].shape
        whole = written[0].new_zeros(n_tokens, n_layers, d_model)
        for place, each in zip(places, written, strict=True):
            whole[:, place] += each
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradient[:, place] for place in ctx.places))


def _as_slice(targets: tuple[int, ...]) -> slice | list[int]:
    first, last = targets[0], targets[-1]
    return slice(first, last + 1) if last - first + 1 == len(targets) else list(targets)


def make_decoder(form: ArchitectureConfig, topology: Topology, n_features: int, d_model: int) -> Decoder:
    """The form that an architecture names."""
    sizes = (topology, n_features, d_model)
    if form.topology == "molt":
        return Mixture(*sizes, ranks=form.ranks)
    if form.shared:
        return SharedOverModels(*sizes, models=form.models, shared=form.shared)
    if form.decoder == "untied":
        return Untied(*sizes)
    if form.decoder == "low_rank":
        return LowRank(*sizes, rank=form.rank)
    tied = TargetTied if form.decoder == "target" else SourceTied
    return tied(*sizes, scale=form.pair_scale, offset=form.pair_offset)
