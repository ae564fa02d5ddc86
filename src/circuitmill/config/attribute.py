"""Options of stage attribute."""

import re
from dataclasses import dataclass

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


@dataclass(frozen=True)
class AttributeConfig:
    """Which prompts are traced, and how much of their graphs is kept."""

    model: ModelConfig
    """The model to trace; it runs in float32 here whatever its dtype says."""
    circuits: dict[str, int]
    """Kind of circuit in the embedded model's truth -> how many prompts, named `<kind>-<number>`."""
    prompts: dict[str, str]
    """Name of a prompt, also its folder -> its text."""
    max_logits: int
    """Most next tokens that a graph explains."""
    logit_mass: float
    """Explain the most probable next tokens until their probabilities reach this."""
    max_feature_nodes: int
    """Trace the most influential features up to this many; memory grows with its square."""
    node_threshold: float
    """Pruning keeps the nodes that hold this share of the influence on the logits."""
    edge_threshold: float
    """Pruning then keeps the edges that hold this share of the influence."""
    verify_edges: int
    """Features per graph whose edges are compared with interventions; 0 for none."""
    feature_windows: int
    """Most windows of a group in a feature's file."""
    undefined: str = ""
    """Why this variant's transcoder has no graphs, so that no prompt is traced. Not an option: a run sets it from
    train.architecture."""

    def __post_init__(self) -> None:
        for key in ("max_logits", "max_feature_nodes", "feature_windows"):
            self._require(getattr(self, key) > 0, "a positive number", key, getattr(self, key))
        for key in ("logit_mass", "node_threshold", "edge_threshold"):
            self._require(0 < getattr(self, key) <= 1, "a share above 0 and at most 1", key, getattr(self, key))
        self._require(self.verify_edges >= 0, "a number of at least 0", "verify_edges", self.verify_edges)
        for kind, count in self.circuits.items():
            self._require(count >= 0, "a number of at least 0", f"circuits.{kind}", count)
        if any(self.circuits.values()) and self.model.source != "toyworld":
            raise ConfigError(
                "no circuits for a model other than the embedded one, which alone has a truth",
                found=", ".join(self.circuits),
                where="attribute.circuits",
                fix="set attribute.circuits={} and name prompts in attribute.prompts",
            )
        names = self._names()
        self._require(bool(names), "at least one circuit or prompt", "prompts", "none")
        for name in names:
            self._require(
                _NAME.match(name) is not None,
                "names of at most 64 letters, digits, '-' and '_' that begin with a letter or digit",
                f"{'prompts' if name in self.prompts else 'circuits'}.{name}",
                repr(name),
            )
        folded = [name.casefold() for name in names]
        twice = sorted({name for name in names if folded.count(name.casefold()) > 1})
        self._require(not twice, "names that differ in more than their capitals", "prompts", ", ".join(twice))

    def _require(self, good: bool, expected: str, key: str, found: object) -> None:
        if not good:
            raise ConfigError(expected, found=found, where=f"attribute.{key}", fix="change the value")

    def units(self) -> tuple[str, ...]:
        """Names of the prompts that are traced, circuits first; none if no graph is defined."""
        return () if self.undefined else self._names()

    def _names(self) -> tuple[str, ...]:
        return (*self.circuit_of(), *self.prompts)

    def circuit_of(self) -> dict[str, tuple[str, int]]:
        """Prompt name -> kind and number of the circuit it is."""
        return {f"{kind}-{index:02d}": (kind, index) for kind, count in self.circuits.items() for index in range(count)}
