"""Everything that a training needs to go on: parameters, optimizer, step, counters of firing, random state."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitmill.config.train import TrainConfig
from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.training import precision, schedules
from circuitmill.training.optimizer import Optimizer, make_optimizer
from circuitmill.training.parallel.cut import without_prefixes
from circuitmill.training.parallel.fsdp import Divided
from circuitmill.training.parallel.gradients import local
from circuitmill.training.parallel.layout import Layout, alone


@dataclass
class TrainState:
    """A training between two steps. The position in the data is the step: batches are addressed by index."""

    transcoder: Transcoder
    """In normalised units."""
    optimizer: Optimizer
    idle: Int[Tensor, "source feature"]
    """Tokens since each feature last fired, over all ranks."""
    density: Float[Tensor, "source feature"]
    """Running share of tokens on which each feature fires."""
    least: Float[Tensor, " source"]
    """Running mean of the smallest activation kept: the threshold of top-k kinds at inference."""
    l0: Float[Tensor, " source"]
    """Running mean of the features that fire on a token, over all ranks."""
    n_dead: int = 0
    """Features that have not fired for `dead_tokens`, over all ranks."""
    step: int = 0
    """Finished steps."""
    reached: set[float] = field(default_factory=set)
    """Values of checkpoint_l0 that the running L0 has fallen below."""
    divided: Divided | None = None
    """What evaluates batches if parameters are divided between steps."""
    decay_from: int = 0
    """Tokens at which stop_l0 was reached and the learning rate began to fall; 0 before."""

    def gathered(self) -> AbstractContextManager:
        """Inside, parameters are whole; ranks that divide them must all come here."""
        return nullcontext() if self.divided is None else self.divided.gathered()

    def divides(self, layout: Layout) -> Callable[[str], bool]:
        """Whether ranks have other parts of the parameter of a name."""
        if self.divided is not None:
            return lambda name: True
        axes = self.transcoder.feature_axes() if layout.features.size > 1 else {}
        return lambda name: axes.get(name) is not None

    def dead(self, after: int) -> Bool[Tensor, "source feature"]:
        """Features that have not fired for at least `after` tokens."""
        return self.idle >= after

    def fired(self, firings: Float[Tensor, "source feature"], n_tokens: float, cfg: TrainConfig) -> None:
        """Count what fired in one batch, over all ranks that have these features.

        Args:
            firings: Tokens on which each feature fired.
            n_tokens: Tokens on which features could fire.
            cfg: Of the training.
        """
        self.idle = torch.where(firings > 0, 0, self.idle + cfg.batch_tokens)
        self.density = torch.lerp(self.density, firings / n_tokens, self._weight(cfg))

    def kept(self, l0: Float[Tensor, " source"], least: Float[Tensor, " source"], cfg: TrainConfig) -> None:
        """Count what was kept of one batch, over all ranks; after `fired`.

        Args:
            l0: Mean number of features that fire on a token.
            least: The smallest activation.
            cfg: Of the training.
        """
        self.l0 = torch.lerp(self.l0, l0, self._weight(cfg))
        found = torch.isfinite(least)
        rate = torch.where(self.least > 0, cfg.nonlinearity.threshold_rate, 1.0)
        self.least = torch.where(found, torch.lerp(self.least, torch.where(found, least, 0.0), rate), self.least)

    def _weight(self, cfg: TrainConfig) -> float:
        """Of one batch in a running mean.

        The window is dead_tokens long; while less has been seen it is all that has been seen.
        """
        return min(1.0, max(cfg.batch_tokens / cfg.dead_tokens, 1 / (self.step + 1)))

    def note_l0(self, cfg: TrainConfig) -> list[float]:
        """Take note of what the running L0 has fallen below; after each step, on all ranks, which find the same.

        It is a mean over sources. The warm-up is waited for: before, few steps have been made and the running L0 is
        that of the starting values.

        Returns:
            Values of checkpoint_l0 that it is below for the first time, largest first.
        """
        tokens = self.step * cfg.batch_tokens
        waiting = set(cfg.checkpoint_l0) - self.reached
        may_stop = cfg.stop_l0 > 0 and not self.decay_from
        if tokens < cfg.warmup_tokens or not (waiting or may_stop):
            return []
        l0 = self.l0.mean().item()
        new = sorted((value for value in waiting if l0 < value), reverse=True)
        self.reached.update(new)
        if may_stop and l0 < cfg.stop_l0:
            self.decay_from = tokens
        return new

    def last_step(self, cfg: TrainConfig) -> int:
        """The step after which the training ends: of the budget, or sooner after stop_l0.

        From there the learning rate falls over as many tokens as at the end of the budget. A constant one does not
        fall, so that nothing is waited for.
        """
        if not self.decay_from:
            return cfg.steps
        share = 0.0 if cfg.schedule == "constant" else cfg.decay_share
        return min(cfg.steps, self.decay_from // cfg.batch_tokens + math.ceil(share * cfg.steps))

    def learning_rate(self, cfg: TrainConfig) -> float:
        """Of the step that comes next."""
        budget, end = (steps * cfg.batch_tokens for steps in (cfg.steps, self.last_step(cfg)))
        return schedules.learning_rate(
            (self.step + 1) * cfg.batch_tokens,
            peak=cfg.lr,
            end=end,
            warmup=cfg.warmup_tokens,
            decay=cfg.decay_share * budget if end == budget else float(end - self.decay_from),
            kind=cfg.schedule,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state on this rank as named tensors, for a checkpoint; they are not copied.

        What is not trained is not in it. With an optimizer that averages, the parameters are the averages.
        """
        named = {
            **{name: getattr(self, name) for name in _COUNTERS},
            "random_state": torch.get_rng_state(),
            "step": torch.tensor(self.step),
            "reached": torch.tensor(sorted(self.reached), dtype=torch.float64),
            "decay_from": torch.tensor(self.decay_from),
        }
        if self.idle.is_cuda:
            named["cuda_random_state"] = torch.cuda.get_rng_state(self.idle.device)
        return named | self.optimizer.tensors()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same configuration.

        Raises:
            ShapeError: the checkpoint is of a transcoder of another shape.
        """
        for parameter, name in self.optimizer.names.items():
            saved = tensors.get(f"parameter.{name}")
            if saved is None or saved.shape != local(parameter).shape:
                raise ShapeError(
                    f"{name} of shape {tuple(local(parameter).shape)}",
                    found="nothing" if saved is None else str(tuple(saved.shape)),
                    where=f"checkpoint, parameter.{name}",
                    fix="remove the checkpoints of the other configuration",
                )
        self.optimizer.restore(tensors)
        for name in _COUNTERS:
            getattr(self, name).copy_(tensors[name])
        self.step, self.decay_from = int(tensors["step"]), int(tensors["decay_from"])
        self.reached = set(tensors["reached"].tolist())
        # more ranks than there were have none; theirs follows from the seed
        if "random_state" in tensors:
            torch.set_rng_state(tensors["random_state"])
        if "cuda_random_state" in tensors and self.idle.is_cuda:
            torch.cuda.set_rng_state(tensors["cuda_random_state"], self.idle.device)


_COUNTERS = ("idle", "density", "least", "l0")


def start(
    cfg: TrainConfig,
    x: Float[Tensor, "token layer d_model"],
    y: Float[Tensor, "token layer d_model"],
    layout: Layout | None = None,
) -> TrainState:
    """A transcoder with starting values and a fresh optimizer; a shard has those that these features have in the whole.

    Args:
        cfg: Seed, sizes and kinds of start.
        x: Normalised inputs of the first batch, from which data-driven starting values are taken.
        y: Normalised outputs of the same tokens.
        layout: Of the ranks; None is one.
    """
    _, n_layers, d_model = x.shape
    layout = layout or alone(cfg.n_features)
    shard = layout.shard
    form = cfg.architecture if shard.n_features == shard.total else without_prefixes(cfg.architecture)
    transcoder = Transcoder(n_layers, shard.n_features, d_model, form, device=x.device)
    torch.manual_seed(cfg.seed)
    init.INITIALISERS[cfg.init.weights](transcoder, generator=torch.Generator().manual_seed(cfg.seed), shard=shard)
    if cfg.init.identical_models:
        init.identical_models(transcoder)
    if cfg.init.zero_decoder:
        init.zero_decoder(transcoder)
    learned = cfg.nonlinearity.name == "jumprelu"
    transcoder.log_threshold.requires_grad_(learned)
    with torch.no_grad():
        transcoder.log_threshold.fill_(math.log(cfg.init.threshold) if learned else -math.inf)
    if cfg.init.encoder_bias == "firing_rate":
        init.encoder_bias_for_rate(transcoder, x, rate=cfg.init.l0 / cfg.n_features)
    if cfg.init.decoder_bias == "mean":
        init.decoder_bias_from_mean(transcoder, y.mean(dim=0))
    return make_state(cfg, transcoder, layout)


def make_state(cfg: TrainConfig, transcoder: Transcoder, layout: Layout | None = None) -> TrainState:
    """A training that has not begun, of a transcoder with starting values.

    What requires a gradient by now is trained.

    Args:
        cfg: Of the training.
        transcoder: The features of this rank's shard.
        layout: Of the ranks; None is one.

    Raises:
        ConfigError: optimizer or precision need a package or a device that is not there.
    """
    layout = layout or alone(cfg.n_features)
    precision.store_matrices(transcoder, cfg)
    like = transcoder.log_threshold.detach()
    divided = Divided(transcoder, layout) if layout.strategy == "fsdp" else None
    return TrainState(
        transcoder,
        make_optimizer(transcoder, cfg, salt=layout.features.index),
        idle=torch.zeros_like(like, dtype=torch.int64),
        density=torch.zeros_like(like),
        least=torch.zeros_like(like[:, 0]),
        l0=torch.zeros_like(like[:, 0], dtype=torch.float64),
        divided=divided,
    )
