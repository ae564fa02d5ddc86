"""The cross-layer transcoder: features read one MLP's input and write to the outputs of it and all later ones.

    h^l = W_enc^l x^l + b_enc^l,   a^l = h^l if h^l > threshold^l else 0,
    yhat^m = b_dec^m + sum over l <= m of W_dec^{l->m} a^l

(formulation of "Circuit Tracing", Ameisen et al. 2025, section "Building an interpretable replacement
model").
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitmill.core.nonlinearity import jumprelu
from circuitmill.errors import ShapeError


class Transcoder(nn.Module):
    """A JumpReLU cross-layer transcoder; all parameters are zero until an initialiser or a store fills them.

    `W_dec[s]` is one tensor [feature target d_model] per source layer s; its target k is layer s + k, so the
    product for one source over all its targets is one matrix product. The logarithm of the threshold is the
    trained parameter, which keeps the threshold positive.

    >>> clt = Transcoder(n_layers=2, n_features=3, d_model=4)
    >>> clt.decode(clt.encode(torch.ones(5, 2, 4))).shape
    torch.Size([5, 2, 4])
    """

    def __init__(self, n_layers: int, n_features: int, d_model: int, device: torch.device | None = None) -> None:
        super().__init__()
        for name, size in (("n_layers", n_layers), ("n_features", n_features), ("d_model", d_model)):
            if size < 1:
                raise ShapeError(
                    "expected a size of at least 1", found=str(size), where=name, fix="choose a positive size"
                )
        self.n_layers = n_layers
        self.n_features = n_features
        self.d_model = d_model
        self.W_enc = nn.Parameter(torch.zeros(n_layers, n_features, d_model, device=device))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, n_features, device=device))
        self.W_dec = nn.ParameterList(
            nn.Parameter(torch.zeros(n_features, n_layers - s, d_model, device=device)) for s in range(n_layers)
        )
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model, device=device))
        self.log_threshold = nn.Parameter(torch.zeros(n_layers, n_features, device=device))

    @property
    def threshold(self) -> Float[Tensor, "layer feature"]:
        """What a pre-activation must exceed for the feature to fire; in units of the pre-activation."""
        return self.log_threshold.exp()

    def pre_activations(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer feature"]:
        """Read every layer's MLP input with that layer's encoder, before the nonlinearity."""
        return einsum(x, self.W_enc, "token layer d_model, layer feature d_model -> token layer feature") + self.b_enc

    def pre_activations_layer(
        self, layer: int, x: Float[Tensor, "token d_model"], features: slice = slice(None)
    ) -> Float[Tensor, "token feature"]:
        """As `pre_activations`, for one layer's features or a block of them."""
        # einsum(x, W_enc[layer, features], "token d_model, feature d_model -> token feature") + b_enc[layer,
        # features]
        return nn.functional.linear(x, self.W_enc[layer, features], self.b_enc[layer, features])

    def encode(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer feature"]:
        """Activations of all features: the pre-activation where it exceeds the threshold, else zero."""
        return jumprelu(self.pre_activations(x), self.log_threshold)

    def encode_layer(
        self, layer: int, x: Float[Tensor, "token d_model"], features: slice = slice(None)
    ) -> Float[Tensor, "token feature"]:
        """Activations of one layer's features, or of a block of them, without computing the others.

        Args:
            features: Which of the layer's features; the output's feature axis has the slice's length.
        """
        return jumprelu(self.pre_activations_layer(layer, x, features), self.log_threshold[layer, features])

    def decode_layer(self, source: int, a: Float[Tensor, "token feature"]) -> Float[Tensor, "token target d_model"]:
        """What one layer's features write to that layer and all later ones, without decoder bias."""
        # einsum(a, W_dec[source], "token feature, feature target d_model -> token target d_model")
        flat = a @ rearrange(self.W_dec[source], "feature target d_model -> feature (target d_model)")
        return rearrange(flat, "token (target d_model) -> token target d_model", d_model=self.d_model)

    def decode(self, a: Float[Tensor, "token layer feature"]) -> Float[Tensor, "token layer d_model"]:
        """Add up what every feature writes: layer m receives b_dec[m] and the writings of all layers up to m."""
        return self.add_up([self.decode_layer(source, a[:, source]) for source in range(self.n_layers)])

    def add_up(self, written: list[Float[Tensor, "token ... d_model"]]) -> Float[Tensor, "token layer d_model"]:
        """Sum what each source wrote (`decode_layer`, in order of sources) into the layers it wrote to, with biases."""
        return torch.stack(
            [
                self.b_dec[layer] + sum(written[source][:, layer - source] for source in range(layer + 1))
                for layer in range(self.n_layers)
            ],
            dim=1,
        )

    def forward(self, x: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """Reconstruct the MLP outputs of all layers from the MLP inputs of all layers."""
        return self.decode(self.encode(x))

    def decoder_norms(self) -> Float[Tensor, "layer feature"]:
        """Length of each feature's decoder vectors concatenated over its targets (not a sum of lengths)."""
        return torch.stack([self.W_dec[s].square().sum(dim=(1, 2)).sqrt() for s in range(self.n_layers)])
