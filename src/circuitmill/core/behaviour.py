"""How much a changed model's predictions differ from the original's, summed over tokens as they stream by."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.core.metrics import agreement, cross_entropy, kl_divergence


class Behaviour:
    """Top-1 agreement, KL(original || changed) and cross-entropy, BOS excluded.

    A position counts for agreement and KL unless it holds BOS. It counts for the cross-entropy if, besides, a
    token follows that is not BOS: where a packed document ends, the next one's BOS is nothing a model need
    predict.

    >>> behaviour = Behaviour()
    >>> tokens = torch.tensor([[1, 0, 0]])
    >>> logits = torch.zeros(1, 3, 2)
    >>> behaviour.update(logits, logits, tokens, bos_id=1)
    >>> behaviour.n_tokens, behaviour.n_predicted, behaviour.kl(), round(behaviour.cross_entropy(), 4)
    (2, 1, 0.0, 0.6931)
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self.n_predicted = 0
        self._agreeing = 0
        self._kl = 0.0
        self._cross_entropy = 0.0

    @torch.no_grad()
    def update(
        self,
        logits: Float[Tensor, "sequence pos d_vocab"],
        changed: Float[Tensor, "sequence pos d_vocab"],
        tokens: Int[Tensor, "sequence pos"],
        bos_id: int,
    ) -> None:
        """Take in the logits of both models on some sequences."""
        tokens = tokens.to(logits.device)
        counted = tokens != bos_id
        predicted = torch.zeros_like(counted)
        predicted[:, :-1] = counted[:, :-1] & counted[:, 1:]
        following = tokens.roll(-1, dims=1)
        self._add(logits[counted], changed[counted])
        self._add_loss(changed[predicted], following[predicted], predicted)

    def _add(self, logits: Float[Tensor, "token d_vocab"], changed: Float[Tensor, "token d_vocab"]) -> None:
        self.n_tokens += logits.shape[0]
        self._agreeing += int(agreement(logits, changed).sum())
        self._kl += float(kl_divergence(logits, changed).double().sum())

    def _add_loss(
        self,
        changed: Float[Tensor, "token d_vocab"],
        following: Int[Tensor, " token"],
        predicted: Bool[Tensor, "sequence pos"],
    ) -> None:
        self.n_predicted += int(predicted.sum())
        self._cross_entropy += float(cross_entropy(changed, following).double().sum())

    def agreement(self) -> float:
        """Share of tokens at which both models rank the same token first."""
        return self._agreeing / self.n_tokens

    def kl(self) -> float:
        """Mean KL(original || changed) in nats per token."""
        return self._kl / self.n_tokens

    def cross_entropy(self) -> float:
        """Mean surprise of the changed model at the tokens that follow, in nats."""
        return self._cross_entropy / self.n_predicted
