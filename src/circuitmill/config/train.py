"""Options of stage `train`: the transcoder, its losses and its optimisation. Budgets are in tokens."""

from dataclasses import dataclass, field
from typing import Literal

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.names import is_import_path, require_known
from circuitmill.config.optimizer import OptimizerConfig
from circuitmill.config.parallel import ParallelConfig
from circuitmill.errors import ConfigError

NONLINEARITIES = ("relu", "jumprelu", "topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax")
"""Names in `circuitmill.core.nonlinearity`."""
TOP_K = NONLINEARITIES[2:]
"""Those that keep a given number of features."""
OVER_TOKENS = ("batch_topk", "batch_topk_all")
"""Those that rank over the tokens of a batch, and so have one threshold in effect."""
OVER_SOURCES = ("token_topk", "batch_topk_all")
"""Those that look at all sources at once."""
TERMS: dict[str, tuple[str, ...]] = {
    "reconstruction": (),
    "tanh_sparsity": ("scale", "norm", "features"),
    "l1": ("norm", "features"),
    "quadratic_l0": ("target",),
    "frequency": ("scale",),
    "pre_activation": ("norm",),
    "auxiliary": ("k",),
    "cross_entropy": (),
    "kl": ("balance",),
}
"""Names in `circuitmill.core.losses`, with the options that each takes."""
END_TO_END = ("cross_entropy", "kl")
"""Terms that need the language model."""
RESOURCES = {"identity": False}
"""Marks an option that says with what a result is computed, not which one."""


@dataclass(frozen=True)
class NonlinearityConfig:
    """From pre-activations to activations while training; a finished transcoder has a threshold per feature."""

    name: str
    """relu, jumprelu, topk (k largest per token and layer), token_topk (per token over layers), batch_topk (of a batch,
    per layer), batch_topk_all (over batch and layers), groupmax (largest of each of k groups), or `module:function`."""
    bandwidth: float = 1.0
    """jumprelu: width of the kernel of the derivative by the threshold, in units of the pre-activation."""
    threshold_derivative: Literal["chain", "direct"] = "chain"
    """jumprelu: what the log-threshold receives, the true chain rule or the derivative by the threshold itself."""
    pass_through: bool = False
    """jumprelu: whether pre-activations near the threshold receive the kernel's derivative too."""
    band_stride: int = 1
    """jumprelu: below the threshold the kernel is evaluated on one token in so many, where few places are worked on."""
    k: float = 0.0
    """Top-k kinds: features per token and layer, on average; 0 for the others."""
    k_start: float = 0.0
    """Top-k kinds: k at the start, from which it falls linearly; 0 starts with k."""
    k_ramp_share: float = 0.0
    """Share of the training over which it falls."""
    threshold_rate: float = 0.01
    """Top-k kinds: weight of a step in the running mean of the least activation kept."""
    calibration_tokens: int = 16_384
    """Top-k kinds: held-out tokens on which thresholds are set at the end, so that as many features fire."""


@dataclass(frozen=True)
class InitConfig:
    """Starting values."""

    threshold: float
    """Of every feature, in units of the pre-activation (of inputs with mean square 1 per dimension)."""
    encoder_bias: Literal["zero", "firing_rate"]
    """Zero, or such that every feature fires on the same share of the first batch."""
    l0: float
    """With firing_rate: features per layer and token that fire at the start."""
    decoder_bias: Literal["zero", "mean"]
    """Zero, or the mean normalised MLP output."""
    weights: Literal["uniform", "transpose", "january_2025"] = "uniform"
    """Uniform encoder and decoder; encoder the transpose of the decoder block of the same layer; or the transpose with
    the scales of Circuits Updates, January 2025."""
    zero_decoder: bool = False
    """Features write nothing at the start."""
    identical_models: bool = False
    """With a crosscoder over models: the same starting values for every model."""


@dataclass(frozen=True)
class TermConfig:
    """One term of the loss, summed over d_model, layers and features, averaged over tokens."""

    coefficient: float
    """Factor of the term; 0 leaves it out."""
    ramp_share: float = 0.0
    """First share of the training over which the coefficient rises linearly from zero."""
    scale: float | None = None
    """tanh_sparsity: inside the hyperbolic tangent; frequency: density at which the penalty of firing is 1."""
    norm: Literal["concatenated", "summed"] | None = None
    """What a feature writes: length of all its decoder vectors put one after the other (default), or their lengths
    added up."""
    features: Literal["all", "shared", "exclusive"] | None = None
    """Which features the term is about: all (default), or those with and without tied decoders."""
    target: float | None = None
    """quadratic_l0: features per token and layer."""
    k: int | None = None
    """auxiliary: dead features per layer and token that take part."""
    balance: bool | None = None
    """kl: weigh it so that it is as large as the reconstruction term."""
    term: str = ""
    """Which term this is, if not the one of its own name: for two terms of a kind, or `module:function`."""

    def check(self, name: str) -> None:
        """Refuse numbers out of range and options that a term of this kind does not take.

        Raises:
            ConfigError: names the key.
        """
        kind = self.term or name
        require_known(kind, TERMS, f"train.loss.{name}.term" if self.term else f"train.loss.{name}")
        _require(self.coefficient >= 0, "a number of at least 0", self.coefficient, f"loss.{name}.coefficient")
        _require(0 <= self.ramp_share <= 1, "a share from 0 to 1", self.ramp_share, f"loss.{name}.ramp_share")
        allowed = TERMS.get(kind)
        for key in ("scale", "norm", "features", "target", "k", "balance"):
            given = getattr(self, key)
            _require(
                given is None or allowed is None or key in allowed,
                f"no such option of term {kind}, which takes {', '.join(allowed or ()) or 'none'}",
                given,
                f"loss.{name}.{key}",
            )
            if key in ("scale", "target", "k") and (given is not None or key in (allowed or ())):
                _require(given is not None and given > 0, "a number above 0", given, f"loss.{name}.{key}")


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured while training. Nothing here changes the result."""

    log_tokens: int
    """Tokens between two rows of metrics."""
    heldout_tokens: int = 4096
    """Held-out tokens on which explained variance, L0, densities and norms are measured; 0 leaves them out."""
    heldout_every_tokens: int = 500_000
    """Tokens between two measurements."""
    behaviour_tokens: int = 0
    """Held-out tokens on which the replacement model is compared with the original at the same times; 0 leaves it
    out."""
    profile_steps: int = 0
    """Steps after the tenth that torch's profiler records, a trace per rank; 0 is off."""

    def __post_init__(self) -> None:
        _require(self.log_tokens > 0, "a number above 0", self.log_tokens, "monitor.log_tokens")
        _require(
            self.heldout_every_tokens > 0, "a number above 0", self.heldout_every_tokens, "monitor.heldout_every_tokens"
        )
        for key in ("heldout_tokens", "behaviour_tokens", "profile_steps"):
            _require(getattr(self, key) >= 0, "a number of at least 0", getattr(self, key), f"monitor.{key}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained transcoder."""

    seed: int
    """Decides starting values and the order of tokens."""
    n_features: int
    """Features per layer; of a crosscoder, in all."""
    tokens: int
    """Length of the training in tokens; may exceed the cache, which is then read again in another order."""
    batch_tokens: int
    """Tokens per step, over all ranks."""
    pool_tokens: int
    """Tokens that are shuffled together; two such pools are in memory, over all ranks."""
    architecture: ArchitectureConfig
    """Who reads, who writes, and the form of decoders."""
    nonlinearity: NonlinearityConfig
    """From pre-activations to activations."""
    scaling: Literal["rms", "standardize"]
    """One factor per layer and side, or mean and standard deviation of every dimension; folded in at the end."""
    init: InitConfig
    """Starting values."""
    loss: dict[str, TermConfig]
    """The terms of the loss by name; a term of your own is named `module:function`."""
    lr: float
    """Learning rate after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"]
    """How it falls over the last decay_share: linearly or by half a cosine to zero, or not at all."""
    warmup_tokens: int
    """Tokens over which the learning rate rises linearly from zero."""
    decay_share: float
    """Last share of the training over which it falls."""
    optimizer: OptimizerConfig
    """How parameters follow the gradient."""
    dead_tokens: int
    """A feature that has not fired for so many tokens counts as dead; also the window of the running density."""
    monitor: MonitorConfig
    """What is measured while training."""
    checkpoint_tokens: int
    """Tokens between two checkpoints."""
    keep_checkpoints: int
    """Newest checkpoints that stay on disk."""
    wandb: bool
    """Mirror the metrics to Weights & Biases; offline unless WANDB_MODE says otherwise."""
    checkpoint_l0: tuple[float, ...] = ()
    """Keep a checkpoint for good when the running L0 per layer first falls below each of these."""
    stop_l0: float = 0.0
    """End the training, decaying the learning rate, when the running L0 per layer falls below this; 0 never does."""
    base: str = ""
    """Start from the transcoder of this variant, or of `run/variant`, instead of starting values."""
    adapter_rank: int = 0
    """With base: train only a low-rank change of its decoders; 0 trains all."""
    products: Literal["auto", "dense", "sparse"] = field(default="auto", metadata=RESOURCES)
    """Whether products are with all activations or with those that are not zero; auto takes what is faster for each
    layer and step. Results are the same up to rounding."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=RESOURCES)
    """How ranks share the work; another choice goes on where this one was."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_nonlinearity()
        self._check_loss()
        self.architecture.check(self.n_features)
        no_vectors = self.architecture.pair_offset or self.architecture.topology == "molt"
        for bad, expected in (
            (not self.base, "0 without a base to adapt"),
            (no_vectors, "0 with topology molt or pair_offset: features have no decoder vectors to change"),
        ):
            _require(not (self.adapter_rank and bad), expected, self.adapter_rank, "adapter_rank")
        if self.architecture.topology == "molt":
            _require(self.scaling == "rms", "rms with topology molt", self.scaling, "scaling")
        if self.architecture.decoder == "source":
            _require(self.scaling == "rms", "rms with a decoder shared by targets", self.scaling, "scaling")
        _require(
            not self.init.identical_models or self.architecture.models > 1,
            "false, except with a crosscoder over several models",
            self.init.identical_models,
            "init.identical_models",
        )
        _require(
            self.init.weights == "uniform" or not no_vectors,
            "uniform with topology molt or pair_offset: features have no decoder vectors to transpose",
            self.init.weights,
            "init.weights",
        )

    def _check_numbers(self) -> None:
        positive = {
            "n_features": self.n_features,
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "pool_tokens": self.pool_tokens,
            "lr": self.lr,
            "dead_tokens": self.dead_tokens,
            "checkpoint_tokens": self.checkpoint_tokens,
            "keep_checkpoints": self.keep_checkpoints,
            "init.threshold": self.init.threshold,
            "init.l0": self.init.l0,
            "nonlinearity.bandwidth": self.nonlinearity.bandwidth,
        }
        for key, value in positive.items():
            _require(value > 0, "a number above 0", value, key)
        for key in ("stop_l0", "adapter_rank"):
            _require(getattr(self, key) >= 0, "a number of at least 0", getattr(self, key), key)
        _require(all(value > 0 for value in self.checkpoint_l0), "numbers above 0", self.checkpoint_l0, "checkpoint_l0")
        _require(0 <= self.decay_share <= 1, "a share from 0 to 1", self.decay_share, "decay_share")
        most = f"fewer than n_features ({self.n_features})"
        _require(self.init.l0 < self.n_features, most, self.init.l0, "init.l0")
        # as many of the first batch as `core.init.encoder_bias_for_rate` makes each feature fire on
        firing = round(self.init.l0 / self.n_features * self.batch_tokens)
        possible = self.init.encoder_bias == "zero" or bool(self.base) or 0 < firing < self.batch_tokens
        some = f"a share of n_features ({self.n_features}) that batch_tokens ({self.batch_tokens}) can show"
        _require(possible, some, self.init.l0, "init.l0")
        for key in ("tokens", "pool_tokens"):
            limit = getattr(self, key)
            _require(self.batch_tokens <= limit, f"at most {key} ({limit})", self.batch_tokens, "batch_tokens")
        _require(
            0 <= self.warmup_tokens <= self.tokens * (1 - self.decay_share),
            "at most what the decay leaves of tokens",
            self.warmup_tokens,
            "warmup_tokens",
        )

    def _check_nonlinearity(self) -> None:
        own = self.nonlinearity
        require_known(own.name, NONLINEARITIES, "train.nonlinearity.name")
        keeps = own.name in TOP_K or is_import_path(own.name)
        for key in ("k", "k_start"):
            value = getattr(own, key)
            _require(
                keeps or value == 0, f"0 with {own.name}, which keeps no given number", value, f"nonlinearity.{key}"
            )
            _require(
                0 <= value <= self.n_features, f"0 to n_features ({self.n_features})", value, f"nonlinearity.{key}"
            )
        _require(
            own.calibration_tokens > 0, "a number above 0", own.calibration_tokens, "nonlinearity.calibration_tokens"
        )
        one = own.band_stride == 1 or (own.name == "jumprelu" and own.band_stride > 1)
        _require(one, "1, or more with jumprelu", own.band_stride, "nonlinearity.band_stride")
        _require(own.name not in TOP_K or own.k > 0, f"a k above 0 with {own.name}", own.k, "nonlinearity.k")
        for key in ("k_ramp_share", "threshold_rate"):
            _require(0 <= getattr(own, key) <= 1, "a share from 0 to 1", getattr(own, key), f"nonlinearity.{key}")
        falls = own.k_start >= own.k or not own.k_start
        _require(falls, f"0, or at least k ({own.k:g}), to which it falls", own.k_start, "nonlinearity.k_start")
        both = (own.k_start > 0) == (own.k_ramp_share > 0)
        _require(both, "above 0 with a k_start, and 0 without", own.k_ramp_share, "nonlinearity.k_ramp_share")
        if own.name == "topk":
            _require(own.k == int(own.k), "a whole number, which every token keeps", own.k, "nonlinearity.k")
        if own.name == "groupmax":
            whole = own.k == int(own.k) and self.n_features % int(own.k) == 0 and not own.k_start
            _require(whole, f"a constant divisor of n_features ({self.n_features})", own.k, "nonlinearity.k")

    def _check_loss(self) -> None:
        for name, term in self.loss.items():
            term.check(name)
            tied = term.features in (None, "all") or self.architecture.shared > 0
            _require(tied, "all, unless architecture.shared is above 0", term.features, f"loss.{name}.features")
        active = self.active_kinds()
        needs_threshold = [kind for kind in ("quadratic_l0", "frequency") if kind in active]
        _require(
            not needs_threshold or self.nonlinearity.name == "jumprelu",
            f"jumprelu with {', '.join(needs_threshold)}, whose gradient is by the threshold",
            self.nonlinearity.name,
            "nonlinearity.name",
        )
        _require(bool(active), "at least one term with a coefficient above 0", list(self.loss), "loss")
        reason = self.architecture.unreplaceable
        _require(not (self.end_to_end and reason), f"no {' or '.join(END_TO_END)}: {reason}", sorted(active), "loss")
        own = self.nonlinearity.name
        _require(
            not self.end_to_end or not (own in OVER_SOURCES or is_import_path(own)),
            f"a nonlinearity that works on one layer at a time with {' or '.join(END_TO_END)}, for which a transcoder "
            "runs while the language model does",
            own,
            "nonlinearity.name",
        )

    def active_terms(self) -> dict[str, TermConfig]:
        """Terms whose coefficient is not zero."""
        return {name: term for name, term in self.loss.items() if term.coefficient}

    def active_kinds(self) -> set[str]:
        """What these terms are."""
        return {term.term or name for name, term in self.active_terms().items()}

    @property
    def end_to_end(self) -> bool:
        """Whether the language model takes part in the loss."""
        return not self.active_kinds().isdisjoint(END_TO_END)

    @property
    def steps(self) -> int:
        """Whole batches in the training."""
        return self.tokens // self.batch_tokens


def _require(condition: bool, expected: str, found: object, key: str) -> None:
    if not condition:
        raise ConfigError(expected, found=found, where=f"train.{key}", fix="correct the value")
