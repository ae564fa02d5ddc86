"""Measures of fit, sparsity and behaviour, one definition each, as accumulators that stream over batches.

Accumulators keep float64 or integer sums, so that the result does not depend on how the tokens were split
into batches, and two accumulators over disjoint tokens `merge` into what one over all tokens would hold.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class ExplainedVariance:
    """Share of the outputs' variance that a reconstruction explains, per layer and pooled over layers.

    EV = 1 - sum ||y - yhat||^2 / sum ||y - ybar||^2 with ybar the mean over all tokens seen, found in one pass by
    merging means and squared deviations (Chan et al. 1979). The normalised squared error is 1 - EV. Nothing
    is clamped.

    >>> y = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])
    >>> ev = ExplainedVariance(n_layers=1, d_model=2)
    >>> ev.update(y[:1], y[:1]); ev.update(y[1:], torch.tensor([[[1.0, 1.0]]]))
    >>> ev.per_layer(), ev.pooled()
    (tensor([0.5000], dtype=torch.float64), 0.5)
    """

    def __init__(self, n_layers: int, d_model: int, device: torch.device | None = None) -> None:
        self.n_tokens = 0
        self.mean = torch.zeros(n_layers, d_model, dtype=torch.float64, device=device)
        self.deviation = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.error = torch.zeros(n_layers, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, y: Float[Tensor, "token layer d_model"], y_hat: Float[Tensor, "token layer d_model"]) -> None:
        """Take in the true outputs of some tokens and their reconstruction; an empty batch changes nothing."""
        if y.shape[0] == 0:
            return
        batch = ExplainedVariance.__new__(ExplainedVariance)
        batch.n_tokens = y.shape[0]
        batch.mean = y.double().mean(dim=0)
        batch.deviation = (y - batch.mean).square().sum(dim=(0, 2))
        batch.error = (y - y_hat).double().square().sum(dim=(0, 2))
        self.merge(batch)

    def merge(self, other: "ExplainedVariance") -> None:
        """Take in what another accumulator saw."""
        n_tokens = self.n_tokens + other.n_tokens
        if n_tokens == 0:
            return
        gap = other.mean - self.mean
        self.deviation += other.deviation + gap.square().sum(dim=1) * (self.n_tokens * other.n_tokens / n_tokens)
        self.mean += gap * (other.n_tokens / n_tokens)
        self.error += other.error
        self.n_tokens = n_tokens

    def per_layer(self) -> Float[Tensor, " layer"]:
        """Explained variance of each layer; not a number for a layer whose outputs never vary."""
        return 1 - self.error / self.deviation

    def pooled(self) -> float:
        """Explained variance with errors and deviations summed over layers first."""
        return float(1 - self.error.sum() / self.deviation.sum())


class Firing:
    """How often features fire, and how many fire at once (L0), per layer and in total.

    A layer is one that features read: a source. Features that read several layers together count as one layer.

    >>> firing = Firing(n_layers=1, n_features=3)
    >>> firing.update(torch.tensor([[[1.0, 0.0, 0.0]], [[2.0, 1.0, 0.0]]]))
    >>> firing.l0(), firing.density()
    (tensor([1.5000], dtype=torch.float64), tensor([[1.0000, 0.5000, 0.0000]], dtype=torch.float64))
    >>> firing.dead()
    tensor([[False, False,  True]])
    """

    def __init__(self, n_layers: int, n_features: int, device: torch.device | None = None) -> None:
        self.n_tokens = 0
        self.n_active = torch.zeros(n_layers, n_features, dtype=torch.int64, device=device)
        self.l0_histogram = torch.zeros(n_layers, n_features + 1, dtype=torch.int64, device=device)
        self.l0_total_histogram = torch.zeros(n_layers * n_features + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, a: Float[Tensor, "token layer feature"]) -> None:
        """Take in the activations of some tokens; only values above zero count as firing."""
        fires = a > 0
        self.n_tokens += a.shape[0]
        self.n_active += fires.sum(dim=0)
        counts = fires.sum(dim=2)
        for layer in range(counts.shape[1]):
            self.l0_histogram[layer] += torch.bincount(counts[:, layer], minlength=self.l0_histogram.shape[1])
        self.l0_total_histogram += torch.bincount(counts.sum(dim=1), minlength=self.l0_total_histogram.shape[0])

    def merge(self, other: "Firing") -> None:
        """Take in what another accumulator saw."""
        self.n_tokens += other.n_tokens
        self.n_active += other.n_active
        self.l0_histogram += other.l0_histogram
        self.l0_total_histogram += other.l0_total_histogram

    def l0(self) -> Float[Tensor, " layer"]:
        """Mean number of features that fire on a token, by layer; the total L0 is the sum."""
        return self.n_active.sum(dim=1).double() / self.n_tokens

    def density(self) -> Float[Tensor, "layer feature"]:
        """Share of tokens on which each feature fires."""
        return self.n_active.double() / self.n_tokens

    def dead(self) -> Bool[Tensor, "layer feature"]:
        """Features that never fired."""
        return self.n_active == 0

    def l0_percentile(self, share: float) -> Int[Tensor, " layer"]:
        """Smallest count that at least this share of tokens does not exceed, by layer.

        Args:
            share: Between 0 and 1; .5 is the median.
        """
        return percentile_of_counts(self.l0_histogram, share)

    def l0_total_percentile(self, share: float) -> int:
        """As `l0_percentile`, for the number of features firing in all layers together."""
        return int(percentile_of_counts(self.l0_total_histogram[None], share)[0])


def percentile_of_counts(histogram: Int[Tensor, "layer bin"], share: float) -> Int[Tensor, " layer"]:
    """Smallest bin up to which at least this share of a histogram lies (bin i counts the occurrences of i).

    >>> percentile_of_counts(torch.tensor([[1, 2, 1]]), 0.5)
    tensor([1])
    """
    cumulative = histogram.cumsum(dim=1)
    return (cumulative < share * cumulative[:, -1:]).sum(dim=1)


def kl_divergence(
    logits: Float[Tensor, "token d_vocab"], replaced: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) of each token in nats, p the softmax of the original logits and q of those after replacement.

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_p, log_q = logits.log_softmax(dim=-1), replaced.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def agreement(
    logits: Float[Tensor, "token d_vocab"], replaced: Float[Tensor, "token d_vocab"]
) -> Bool[Tensor, " token"]:
    """Whether both predict the same most likely token.

    >>> agreement(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 5.0]]))
    tensor([True])
    """
    return logits.argmax(dim=-1) == replaced.argmax(dim=-1)


def cross_entropy(logits: Float[Tensor, "token d_vocab"], following: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Surprise in nats at the token that follows.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    return torch.nn.functional.cross_entropy(logits, following.long(), reduction="none")


def cross_entropy_recovered(original: float, replaced: float, ablated: float) -> float:
    """Share of what ablation loses that the replacement keeps: (ablated - replaced) / (ablated - original).

    >>> cross_entropy_recovered(original=1.0, replaced=1.5, ablated=3.0)
    0.75
    """
    return (ablated - replaced) / (ablated - original)
