"""Terms of the training loss. Each is summed over d_model, layers and features and averaged over tokens.

With that reduction a coefficient means the same at any batch size, and the mean of a term over equal parts of
a batch is the term of the whole batch. Every function takes one layer ("token feature") or all layers ("token
layer feature"). Source: "Circuit Tracing" (Ameisen et al. 2025), appendix on training, and "Circuits Updates,
January 2025".
"""

import torch
from jaxtyping import Float
from torch import Tensor


def reconstruction(
    y: Float[Tensor, "token layer d_model"], y_hat: Float[Tensor, "token layer d_model"]
) -> Float[Tensor, ""]:
    """Squared error: mean over tokens of sum over layers of ||y - yhat||^2.

    >>> reconstruction(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    tensor(12.)
    """
    return (y - y_hat).square().sum() / y.shape[0]


def tanh_sparsity(
    a: Float[Tensor, "token *layer feature"], norms: Float[Tensor, "*layer feature"], scale: float
) -> Float[Tensor, ""]:
    """A smooth count of active features: mean over tokens of the sum of tanh(scale * norm * a).

    >>> tanh_sparsity(torch.tensor([[0.0, 100.0, 100.0]]), torch.ones(3), scale=4.0)
    tensor(2.)

    Args:
        norms: Length of each feature's concatenated decoder, so that shrinking activations and growing
        decoders
            does not pay.
        scale: How fast the count saturates; the reciprocal of the written length that counts as "active".
    """
    return torch.tanh(a * (norms * scale)).sum() / a.shape[0]


def pre_activation(
    pre: Float[Tensor, "token *layer feature"],
    threshold: Float[Tensor, "*layer feature"],
    norms: Float[Tensor, "*layer feature"],
) -> Float[Tensor, ""]:
    """Lifts features that do not fire: mean over tokens of the sum of relu(threshold - pre) * norm.

    The norms are weights here and receive no gradient: otherwise the term is also lowered by shrinking the decoders of
    rare features, which then fire and write nothing.

    >>> pre_activation(torch.tensor([[0.5, 2.0]]), torch.ones(2), torch.ones(2))
    tensor(0.5000)
    """
    return ((threshold - pre).relu().sum(dim=0) * norms.detach()).sum() / pre.shape[0]


def auxiliary(
    error: Float[Tensor, "token layer d_model"], error_hat: Float[Tensor, "token layer d_model"]
) -> Float[Tensor, ""]:
    """What dead features leave of the error they are asked to explain (Gao et al. 2024, section 2.4, "AuxK").

    The mean over tokens of ||e - ehat||^2 with e = y - yhat detached. It is not divided by ||e||^2 of the
    batch, which would make it depend on how the batch is split over ranks.
    """
    return (error.detach() - error_hat).square().sum() / error.shape[0]


def strongest(pre: Float[Tensor, "token feature"], k: int) -> Float[Tensor, "token feature"]:
    """Keep the k largest positive pre-activations of each token, zero elsewhere.

    >>> strongest(torch.tensor([[3.0, -1.0, 2.0, 1.0]]), k=2)
    tensor([[3., 0., 2., 0.]])
    """
    k = min(k, pre.shape[1])
    values, indices = pre.relu().topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values)
