"""The attribution graph of one prompt, before pruning, and what a check of its edges found."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A next token that the graph explains."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class AttributionGraph:
    """Direct effects between the nodes of one prompt's local replacement model.

    Node order: features, errors (layer by layer, positions inside), embeddings, logits. `adjacency[t, s]` is
    the direct effect of node s on node t: on a feature's pre-activation, or on a logit minus the mean logit.
    Errors and embeddings have no inputs ("Circuit Tracing", Ameisen et al. 2025, section "Constructing an
    attribution graph").
    """

    prompt: str
    tokens: tuple[int, ...]
    """BOS first."""
    token_texts: tuple[str, ...]
    n_layers: int
    n_active: int
    """Active features on the prompt, of which the most influential have nodes."""
    features: Int[Tensor, "feature 3"]
    """Layer, position and index of each feature node."""
    activations: Float[Tensor, " feature"]
    targets: tuple[Target, ...]
    """Logit nodes, the most probable first."""
    adjacency: Float[Tensor, "node node"]
    unattributed: Float[Tensor, " node"]
    """What reaches a feature or logit node from no node: biases, positions, the first token's MLP outputs and
    features beyond the cap. In the unit of the node's row; zero for errors and embeddings."""

    @property
    def n_features(self) -> int:
        """Feature nodes."""
        return len(self.features)

    @property
    def errors(self) -> slice:
        """Where the error nodes are."""
        return slice(self.n_features, self.n_features + self.n_layers * len(self.tokens))

    @property
    def embeddings(self) -> slice:
        """Where the embedding nodes are."""
        return slice(self.errors.stop, self.errors.stop + len(self.tokens))

    @property
    def logits(self) -> slice:
        """Where the logit nodes are."""
        return slice(self.embeddings.stop, self.embeddings.stop + len(self.targets))


@dataclass(frozen=True)
class EdgeCheck:
    """The result of comparing edges with interventions."""

    n_features: int
    worst_feature: float
    """Largest difference in a feature's pre-activation."""
    worst_logit: float
    """Largest difference in a logit less the mean logit."""
    largest_edge: float
    """Largest edge out of the checked features, for scale."""

    @property
    def relative(self) -> float:
        """The worst difference as a share of the largest edge, or of 1 if all edges are smaller."""
        return max(self.worst_feature, self.worst_logit) / max(1.0, self.largest_edge)
