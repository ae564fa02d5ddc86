"""The training loop.

1. Take this rank's part of batch `step`.  2. Loss and gradients, one micro-batch after the other.  3. Gradients reduced
over ranks; dead counters; figures of all ranks in one collective, checked to be finite.  4. Gradients clipped, and the
optimizer with the scheduled rate.  5. What the running L0 has fallen below.  6. Metrics, held-out figures and
checkpoint when their number of tokens has passed.

The result depends on configuration and data alone: a training that was interrupted at any time and resumed from its
last checkpoint on as many ranks ends in the same parameters as an unbroken one, bit by bit on a CPU.
"""

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from circuitmill import distributed
from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.errors import InterruptedRun
from circuitmill.stores.metrics import Row
from circuitmill.training import precision, profile
from circuitmill.training.batches import Batches, Pair
from circuitmill.training.figures import Figures, figures_of, merge_explained_variance
from circuitmill.training.objective import BatchResult, Moment, coefficients_at, evaluate_batch
from circuitmill.training.parallel import gradients
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.sequences import SequenceBatch, SequenceBatches, parts_of
from circuitmill.training.state import TrainState

_log = logging.getLogger(__name__)


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
    layout: Layout,
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
        layout: This rank among those that train together.
        log: Takes a row of metrics every `monitor.log_tokens`, with every measurement and at the end; called on all
            ranks with the same numbers; memory, speed and the way of products apart.
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
    clock, few = _Clock(layout), None
    state.n_dead = int(layout.features.total(state.dead(cfg.dead_tokens).sum()))
    with profile.recorded(cfg.monitor.profile_steps, trace) as before_step:
        while state.step < state.last_step(cfg):
            before_step()
            distributed.note(state.step)
            batch = clock.wait_for(lambda: batches.get(state.step))
            result, figures = _step(cfg, state, batch, layout, asked=stop())
            few = _note_products(few, result.sparse, state.step)
            new = state.note_l0(cfg)
            last = state.step >= state.last_step(cfg)
            measuring = measure is not None and (last or _passed(cfg.monitor.heldout_every_tokens, state, cfg))
            if last or measuring or _passed(cfg.monitor.log_tokens, state, cfg):
                lap = clock.lap(state.step, cfg.batch_tokens)
                with clock.stopped():
                    row = _row(cfg, state, result, figures, layout) | lap
                    if measuring and measure is not None:
                        with state.optimizer.evaluating():
                            row |= measure(state)
                log(row)
            advance(cfg.batch_tokens)
            for l0 in new:
                checkpoint(state, l0)
            if last or figures.stopping or _passed(cfg.checkpoint_tokens, state, cfg):
                checkpoint(state)
            if figures.stopping and not last:
                raise InterruptedRun(
                    f"{cfg.steps} steps",
                    found=f"a request to stop after step {state.step}",
                    where="train",
                    fix="run the same command again: it continues from the checkpoint made now",
                )
    state.optimizer.finish()
    return Ended(state.step, "stop_l0" if state.step < cfg.steps else "budget")


def _step(
    cfg: TrainConfig, state: TrainState, batch: Pair | SequenceBatch, layout: Layout, *, asked: bool
) -> tuple[BatchResult, Figures]:
    """One update; returns what the batch gave on this rank and its figures over all ranks.

    Terms are means over tokens and micro-batches are equally long, so the mean over them is the term of the whole
    batch. Nonlinearities that rank over a batch (batch_topk, batch_topk_all) rank within each micro-batch, over ranks.
    """
    optimizer, own = state.optimizer, cfg.optimizer
    moment = Moment((state.step + 1) * cfg.batch_tokens, state.dead(cfg.dead_tokens), state.density, state.n_dead)
    parts = layout.training(ragged=cfg.end_to_end)
    results = []
    for x, y, whole in parts_of(batch, own.micro_batches):

        def evaluate(x: Tensor = x, y: Tensor = y, whole: SequenceBatch | None = whole) -> tuple[Tensor, BatchResult]:
            result = evaluate_batch(state.transcoder, x, y, cfg, moment, whole, parts)
            return result.loss, replace(result, loss=result.loss.detach())

        with precision.products(own.precision, x.device):
            loss, result = evaluate() if state.divided is None else state.divided(evaluate)
        optimizer.backward(loss / own.micro_batches)
        results.append(result)
    result = _combined(results)
    optimizer.unscale()
    counts = torch.cat([result.firings.flatten().float(), result.firings.new_tensor([len(result.y)]).float()])
    counts = gradients.reduce_gradients(optimizer.names, counts, layout)
    state.fired(counts[:-1].view_as(state.density).to(state.density.dtype), counts[-1].item(), cfg)
    figures = figures_of(
        result,
        layout,
        squares=gradients.squares(optimizer.names, state.divides(layout)),
        n_dead=int(state.dead(cfg.dead_tokens).sum()),
        asked=asked,
    )
    for name, term in figures.terms.items():
        precision.require_finite(term, f"{name} term of the loss", state.step)
    optimizer.clip(own.clip_norm, figures.grad_norm)
    optimizer.step(state.learning_rate(cfg), norm=figures.grad_norm, number=state.step)
    state.kept(figures.l0, figures.least, cfg)
    state.n_dead = figures.n_dead
    state.step += 1
    return result, figures


def _note_products(before: tuple[bool, ...] | None, now: tuple[bool, ...], step: int) -> tuple[bool, ...]:
    """Say with what decoders are multiplied, when that has changed."""
    if now != before:
        layers = [source for source, few in enumerate(now) if few]
        _log.info("step %d: %d of %d layers work with active features alone: %s", step, len(layers), len(now), layers)
    return now


def _combined(results: list[BatchResult]) -> BatchResult:
    """What the whole batch would have given, from its micro-batches."""
    if len(results) == 1:
        return results[0]

    def mean(of: Callable[[BatchResult], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([of(result)[name] for result in results]).mean() for name in of(results[0])}

    return replace(
        results[0],
        terms=mean(lambda result: result.terms),
        weighted=mean(lambda result: result.weighted),
        loss=torch.stack([result.loss for result in results]).mean(),
        y=torch.cat([result.y for result in results]),
        y_hat=torch.cat([result.y_hat for result in results]),
        firings=torch.stack([result.firings for result in results]).sum(dim=0),
        least=torch.stack([result.least for result in results]).amin(dim=0),
        sparse=tuple(all(ways) for ways in zip(*(result.sparse for result in results), strict=True)),
    )


def _passed(interval: int, state: TrainState, cfg: TrainConfig) -> bool:
    """Whether the last step crossed a multiple of `interval` tokens."""
    return state.step * cfg.batch_tokens // interval > (state.step - 1) * cfg.batch_tokens // interval


def _row(cfg: TrainConfig, state: TrainState, result: BatchResult, figures: Figures, layout: Layout) -> Row:
    """Metrics of the batch just seen, over all ranks; explained variance and L0 are from before the update."""
    own = ExplainedVariance(state.transcoder.n_layers, state.transcoder.d_model, device=result.y_hat.device)
    own.update(result.y, result.y_hat)
    ev = merge_explained_variance(own, layout.data)
    tokens = state.step * cfg.batch_tokens
    row: Row = {
        "step": state.step,
        "tokens": tokens,
        "loss": figures.loss,
        **{f"loss_{name}": value for name, value in figures.terms.items()},
        "ev": ev.pooled(),
        "ev_per_layer": ev.per_layer().tolist(),
        "l0": figures.l0.tolist(),
        "dead": state.n_dead / (state.transcoder.n_sources * cfg.n_features),
        "lr": state.optimizer.lr,
        "coefficients": coefficients_at(cfg, tokens),
        "grad_norm": figures.grad_norm,
        "sparse_layers": sum(result.sparse),
        "peak_memory_bytes": peak_memory(result.y_hat.device),
    }
    if state.optimizer.loss_scale is not None:
        row["loss_scale"] = state.optimizer.loss_scale.scale
    return row


def peak_memory(device: torch.device) -> int:
    """Most memory that this rank has held so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Speed, the share of time spent waiting for data, and what is sent per step, since the last row."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._start, self._step, self._waited = time.perf_counter(), None, 0.0
        self._sent = layout.wire_bytes

    def wait_for(self, read: Callable[[], Pair | SequenceBatch]) -> Pair | SequenceBatch:
        before = time.perf_counter()
        batch = read()
        self._waited += time.perf_counter() - before
        return batch

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside is not part of the training."""
        before, sent = time.perf_counter(), self._layout.wire_bytes
        yield
        self._start += time.perf_counter() - before
        self._sent += self._layout.wire_bytes - sent

    def lap(self, step: int, batch_tokens: int) -> Row:
        now, sent = time.perf_counter(), self._layout.wire_bytes
        seconds = now - self._start
        row: Row = {"tokens_per_second": None, "data_wait_share": self._waited / seconds}
        if self._step is not None:
            steps = step - self._step
            row["tokens_per_second"] = steps * batch_tokens / seconds
            if self._layout.ranks.size > 1:
                row["wire_bytes_per_step"] = (sent - self._sent) / steps
        self._start, self._step, self._waited, self._sent = now, step, 0.0, sent
        return row
