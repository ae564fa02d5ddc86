"""The training loop.

1. Take this rank's slice of batch `step`.  2. Loss, checked to be finite, and gradients, one micro-batch after the
other.  3. Gradients averaged over ranks, clipped.  4. The optimizer with the scheduled rate.  5. Dead counters, and
what the running L0 has fallen below.  6. Metrics, held-out figures and checkpoint when their number of tokens has
passed.

The result depends on configuration and data alone: a training that was interrupted at any time and resumed
from its last checkpoint ends in the same parameters as an unbroken one, bit by bit on a CPU with one rank.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch

from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.distributed import Ranks
from circuitmill.errors import InterruptedRun
from circuitmill.training import parallel, precision, profile
from circuitmill.training.batches import Batches, Pair
from circuitmill.training.monitor import Row
from circuitmill.training.objective import BatchResult, Moment, coefficients_at, evaluate_batch
from circuitmill.training.sequences import SequenceBatch, SequenceBatches, parts_of
from circuitmill.training.state import TrainState


@runtime_checkable
class Checkpoint(Protocol):
    """Stores a state."""

    def __call__(self, state: TrainState, l0: float | None = None, /) -> None:
        """With a value of checkpoint_l0 for good, else until newer ones come."""


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    steps: int
    """Finished, those before it was resumed included."""
    reason: Literal["budget", "stop_l0"]
    """All tokens of the configuration were seen, or the running L0 fell below stop_l0."""


def train(
    cfg: TrainConfig,
    state: TrainState,
    batches: Batches | SequenceBatches,
    *,
    ranks: Ranks,
    log: Callable[[Row], None],
    checkpoint: Checkpoint,
    advance: Callable[[int], None],
    stop: Callable[[], bool],
    measure: Callable[[TrainState], Row] | None = None,
    trace: Path | None = None,
) -> Ended:
    """Train `state` in place up to `cfg.steps`, or until stop_l0 and the decay of the learning rate after it.

    Afterwards its transcoder is what is to be saved: in float32, and averaged if the optimizer averages.

    Args:
        cfg: What to train and how.
        state: Fresh, or restored from a checkpoint.
        batches: Of this rank, normalised.
        ranks: This process among those that train together.
        log: Takes a row of metrics every `monitor.log_tokens`, with every measurement and at the end; called on all
            ranks with the same numbers, memory and speed apart.
        checkpoint: Stores the state every `checkpoint_tokens` and at the end, and with each value of checkpoint_l0
            when the running L0 has fallen below it; called on all ranks.
        advance: Told the number of tokens after each step.
        stop: Whether this rank has been asked to stop; asked once per step.
        measure: Adds figures to a row every `monitor.heldout_every_tokens` and at the end. It sees the transcoder as it
            would be saved, and may not change the state; called on all ranks.
        trace: Where this rank's profile goes, with `monitor.profile_steps`.

    Raises:
        ConfigError: micro-batches do not divide a rank's batch, or nobody said where the profile goes.
        DivergedError: a term of the loss or the gradient is not finite; the update is not made.
        InterruptedRun: a rank was asked to stop; a checkpoint has been made.
    """
    clock = _Clock()
    with profile.recorded(cfg.monitor.profile_steps, trace) as before_step:
        while state.step < state.last_step(cfg):
            before_step()
            batch = clock.wait_for(lambda: batches.get(state.step))
            result, grad_norm = _step(cfg, state, batch, ranks)
            stopping = _count(cfg, state, result, ranks, asked=stop())
            new = state.note_l0(cfg)
            last = state.step >= state.last_step(cfg)
            measuring = measure is not None and (last or _passed(cfg.monitor.heldout_every_tokens, state, cfg))
            if last or measuring or _passed(cfg.monitor.log_tokens, state, cfg):
                row = _row(cfg, state, result, grad_norm, ranks) | clock.lap(state.step * cfg.batch_tokens)
                if measuring and measure is not None:
                    with clock.stopped(), state.optimizer.evaluating():
                        row |= measure(state)
                log(row)
            advance(cfg.batch_tokens)
            for l0 in new:
                checkpoint(state, l0)
            if last or stopping or _passed(cfg.checkpoint_tokens, state, cfg):
                checkpoint(state)
            if stopping and not last:
                raise InterruptedRun(
                    f"{cfg.steps} steps",
                    found=f"a request to stop after step {state.step}",
                    where="train",
                    fix="run the same command again: it continues from the checkpoint made now",
                )
    state.optimizer.finish()
    return Ended(state.step, "stop_l0" if state.step < cfg.steps else "budget")


def _step(
    cfg: TrainConfig, state: TrainState, batch: Pair | SequenceBatch, ranks: Ranks
) -> tuple[BatchResult, torch.Tensor]:
    """One update; returns what the batch gave and the gradient's norm before clipping.

    Terms are means over tokens and micro-batches are equally long, so the mean over them is the term of the whole
    batch. Nonlinearities that rank over a batch (batch_topk, batch_topk_all) rank within each micro-batch.
    """
    optimizer, own = state.optimizer, cfg.optimizer
    moment = Moment((state.step + 1) * cfg.batch_tokens, state.dead(cfg.dead_tokens), state.density)
    results = []
    for x, y, whole in parts_of(batch, own.micro_batches):
        with precision.products(own.precision, x.device):
            result = evaluate_batch(state.transcoder, x, y, cfg, moment, whole)
        for name, term in result.terms.items():
            precision.require_finite(term, f"{name} term of the loss", state.step)
        optimizer.backward(result.loss / own.micro_batches)
        results.append(replace(result, loss=result.loss.detach()))
    # types apart, because they travel as one tensor; in an order that is the same on all ranks
    for dtype in dict.fromkeys(parameter.dtype for parameter in optimizer.parameters):
        parallel.average_gradients([p for p in optimizer.parameters if p.dtype == dtype], ranks)
    grad_norm = optimizer.clip(own.clip_norm)
    optimizer.step(state.learning_rate(cfg), norm=grad_norm, number=state.step)
    return _combined(results), grad_norm


def _combined(results: list[BatchResult]) -> BatchResult:
    """What the whole batch would have given, from its micro-batches."""
    if len(results) == 1:
        return results[0]
    return replace(
        results[0],
        terms={name: torch.stack([result.terms[name] for result in results]).mean() for name in results[0].terms},
        loss=torch.stack([result.loss for result in results]).mean(),
        y=torch.cat([result.y for result in results]),
        y_hat=torch.cat([result.y_hat for result in results]),
        firings=torch.stack([result.firings for result in results]).sum(dim=0),
        least=torch.stack([result.least for result in results]).amin(dim=0),
    )


def _count(cfg: TrainConfig, state: TrainState, result: BatchResult, ranks: Ranks, *, asked: bool) -> bool:
    """Count a step and what fired in it; returns whether any rank was asked to stop."""
    # the last elements carry tokens, of which whole sequences have fewer than the batch has by BOS, and the request,
    # so that all ranks leave after the same step
    extra = torch.tensor([len(result.y), asked], device=result.firings.device, dtype=result.firings.dtype)
    counts = parallel.total(torch.cat([result.firings.flatten(), extra]), ranks)
    firings, n_tokens, stopping = counts[:-2].view_as(result.firings), int(counts[-2]), bool(counts[-1])
    state.seen(firings, parallel.least(result.least, ranks), cfg, n_tokens)
    state.step += 1
    return stopping


def _passed(interval: int, state: TrainState, cfg: TrainConfig) -> bool:
    """Whether the last step crossed a multiple of `interval` tokens."""
    return state.step * cfg.batch_tokens // interval > (state.step - 1) * cfg.batch_tokens // interval


def _row(
    cfg: TrainConfig,
    state: TrainState,
    result: BatchResult,
    grad_norm: torch.Tensor,
    ranks: Ranks,
) -> Row:
    """Metrics of the batch just seen, over all ranks; explained variance and L0 are from before the update."""
    transcoder = state.transcoder
    own = ExplainedVariance(transcoder.n_layers, transcoder.d_model, device=result.y_hat.device)
    own.update(result.y, result.y_hat)
    ev = parallel.merge_explained_variance(own, ranks)
    names = list(result.terms)
    values = torch.stack([result.loss, *result.terms.values()])
    loss, *terms = parallel.average(values, ranks).tolist()
    tokens = state.step * cfg.batch_tokens
    row: Row = {
        "step": state.step,
        "tokens": tokens,
        "loss": loss,
        **{f"loss_{name}": value for name, value in zip(names, terms, strict=True)},
        "ev": ev.pooled(),
        "ev_per_layer": ev.per_layer().tolist(),
        "l0": parallel.average(result.l0, ranks).tolist(),
        "dead": state.dead(cfg.dead_tokens).double().mean().item(),
        "lr": state.optimizer.lr,
        "coefficients": coefficients_at(cfg, tokens),
        "grad_norm": grad_norm.item(),
        "peak_memory_bytes": _peak_memory(result.y_hat.device),
    }
    if state.optimizer.loss_scale is not None:
        row["loss_scale"] = state.optimizer.loss_scale.scale
    return row


def _peak_memory(device: torch.device) -> int:
    """Most memory that this rank has held so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Speed and the share of time spent waiting for data, since the last row."""

    def __init__(self) -> None:
        self._start, self._tokens, self._waited = time.perf_counter(), None, 0.0

    def wait_for(self, read: Callable[[], Pair | SequenceBatch]) -> Pair | SequenceBatch:
        before = time.perf_counter()
        batch = read()
        self._waited += time.perf_counter() - before
        return batch

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside is not part of the training's time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def lap(self, tokens: int) -> Row:
        now = time.perf_counter()
        seconds = now - self._start
        speed = None if self._tokens is None else (tokens - self._tokens) / seconds
        row: Row = {"tokens_per_second": speed, "data_wait_share": self._waited / seconds}
        self._start, self._tokens, self._waited = now, tokens, 0.0
        return row
