"""What a transcoder looks like: who reads, who writes, and in which form the decoders are."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError

REPRODUCES = ("sae", "crosscoder")
"""Topologies that write what they read; all others read MLP inputs and write MLP outputs."""
TRACEABLE = ("clt", "plt")
"""Topologies of which circuit-tracer can trace a replacement model."""


@dataclass(frozen=True)
class ArchitectureConfig:
    """One parameterised module: a topology, a form of decoder, and switches."""

    topology: Literal["clt", "plt", "acausal", "sae", "crosscoder", "molt"] = "clt"
    """clt: a layer's features write to it and all later layers; plt: to it alone; acausal: to all; sae: features of a
    hookpoint write to it; crosscoder: features read and write all hookpoints together; molt: a sparse mixture of
    linear transforms per layer, features being transforms."""
    decoder: Literal["untied", "target", "source", "low_rank"] = "untied"
    """A decoder per source and target; one per target, shared by its sources; one per source, shared by its targets;
    or one per source and target that goes through `rank` numbers."""
    rank: int = 0
    """With low_rank: numbers between features and MLP output; else 0."""
    pair_scale: bool = False
    """With a decoder per target or source: a trained factor per source, target and feature."""
    pair_offset: bool = False
    """The same for a trained number that is added where a feature is active. It cannot be traced."""
    skip: bool = False
    """A linear map from each layer's MLP input to its own output besides the features. It cannot be traced."""
    ranks: tuple[int, ...] = ()
    """With molt: ranks of the transforms, largest first; each has twice as many transforms as the one before."""
    models: int = 1
    """With crosscoder: how many models the hookpoints come from, the first model's first."""
    shared: int = 0
    """With crosscoder over models: features, the first ones, whose decoders are the same for all models."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many features of each layer reconstruct on their own too; the last is n_features."""

    def __post_init__(self) -> None:
        tied = self.decoder in ("target", "source")
        self._require(
            (self.rank > 0) == (self.decoder == "low_rank"),
            "a rank above 0 with decoder low_rank, and 0 with the others",
            "rank",
        )
        for key in ("pair_scale", "pair_offset"):
            self._require(not getattr(self, key) or tied, "false, except with decoder target or source", key)
        self._require(
            self.decoder == "untied" or self.topology in ("clt", "acausal"),
            f"untied with topology {self.topology}, which has one decoder per feature",
            "decoder",
        )
        self._require(
            not self.skip or self.topology not in REPRODUCES,
            f"false with topology {self.topology}: a linear map onto its own input would leave nothing to learn",
            "skip",
        )
        self._require(
            bool(self.ranks) == (self.topology == "molt"), "ranks with topology molt, and none with the others", "ranks"
        )
        self._require(
            all(rank > 0 for rank in self.ranks) and list(self.ranks) == sorted(set(self.ranks), reverse=True),
            "positive ranks, decreasing",
            "ranks",
        )
        over_models = self.topology == "crosscoder" and self.models > 1
        self._require(
            self.models == 1 or (self.topology == "crosscoder" and self.models > 1),
            "1, or more with topology crosscoder",
            "models",
        )
        self._require(self.shared >= 0, "a number of at least 0", "shared")
        self._require(self.shared == 0 or over_models, "0, except with a crosscoder over several models", "shared")
        self._require(
            list(self.prefixes) == sorted(set(self.prefixes)) and all(one > 0 for one in self.prefixes),
            "positive numbers, increasing",
            "prefixes",
        )

    def check(self, n_features: int) -> None:
        """Refuse what does not fit the number of features.

        Raises:
            ConfigError: names the key.
        """
        self._require(
            not self.prefixes or self.prefixes[-1] == n_features, f"n_features ({n_features}) as the last", "prefixes"
        )
        self._require(self.shared <= n_features, f"at most n_features ({n_features})", "shared")
        if self.ranks:
            units = 2 ** len(self.ranks) - 1
            self._require(
                n_features % units == 0,
                f"an n_features that is a multiple of {units} (1 + 2 + 4 ... over {len(self.ranks)} ranks)",
                "ranks",
                found=f"n_features {n_features}",
            )

    @property
    def reproduces(self) -> bool:
        """Whether it writes what it reads."""
        return self.topology in REPRODUCES

    @property
    def unreplaceable(self) -> str:
        """Why no language model runs with it in place of MLPs; empty if one does."""
        if self.reproduces:
            return f"topology {self.topology} writes what it reads, not what MLPs write"
        if self.topology == "acausal":
            return "topology acausal writes to layers that run before those it reads"
        return ""

    @property
    def untraceable(self) -> str:
        """Why no attribution graph is defined; empty if one is."""
        if self.topology not in TRACEABLE:
            return f"topology {self.topology} does not replace MLPs in the order of layers by sums of features"
        if self.skip:
            return "the linear skip connection has no place in a graph of features"
        if self.pair_offset:
            return "offsets on active features are not linear in the activation"
        return ""

    def _require(self, good: bool, expected: str, key: str, found: object = None) -> None:
        if not good:
            raise ConfigError(
                expected,
                found=repr(getattr(self, key)) if found is None else found,
                where=f"train.architecture.{key}",
                fix="change one of the two",
            )
