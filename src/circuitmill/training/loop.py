"""The training loop.

1. Take this rank's slice of batch `step`.  2. Loss, checked to be finite.  3. Gradients, averaged over ranks,
clipped.
4. Adam with the scheduled rate.  5. Dead counters.  6. Metrics and checkpoint when their number of tokens has
passed.

The result depends on configuration and data alone: a training that was interrupted at any time and resumed
from its last checkpoint ends in the same parameters as an unbroken one, bit by bit on a CPU with one rank.
"""

import time
from collections.abc import Callable

import torch

from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.distributed import Ranks
from circuitmill.errors import DivergedError, InterruptedRun
from circuitmill.training import parallel, schedules
from circuitmill.training.batches import Batches, Pair
from circuitmill.training.monitor import Row
from circuitmill.training.objective import BatchResult, Moment, coefficients_at, evaluate_batch
from circuitmill.training.state import TrainState


def train(
    cfg: TrainConfig,
    state: TrainState,
    batches: Batches,
    *,
    ranks: Ranks,
    log: Callable[[Row], None],
    checkpoint: Callable[[TrainState], None],
    advance: Callable[[int], None],
    stop: Callable[[], bool],
) -> None:
    """Train `state` in place up to `cfg.steps`.

    Args:
        cfg: What to train and how.
        state: Fresh, or restored from a checkpoint.
        batches: Normalised batches of this rank.
        ranks: This process among those that train together.
        log: Takes a row of metrics every `cfg.log_tokens`; called on all ranks with the same numbers.
        checkpoint: Stores the state every `cfg.checkpoint_tokens` and at the end; called on all ranks.
        advance: Told the number of tokens after each step.
        stop: Whether this rank has been asked to stop; asked once per step.

    Raises:
        DivergedError: a term of the loss or the gradient is not finite; the update is not made.
        InterruptedRun: a rank was asked to stop; a checkpoint has been made.
    """
    clock = _Clock()
    while state.step < cfg.steps:
        pair = clock.wait_for(lambda: batches.get(state.step))
        result, grad_norm = _step(cfg, state, pair, ranks)
        # the last element carries the request to stop, so that all ranks leave after the same step
        asked = torch.tensor([stop()], device=result.firings.device, dtype=result.firings.dtype)
        counts = parallel.total(torch.cat([result.firings.flatten(), asked]), ranks)
        firings, stopping = counts[:-1].view_as(result.firings), bool(counts[-1])
        state.seen(firings, parallel.least(result.least, ranks), cfg)
        state.step += 1
        last = state.step == cfg.steps
        if last or _passed(cfg.monitor.log_tokens, state.step, cfg.batch_tokens):
            log(_row(cfg, state, pair, result, grad_norm, ranks) | clock.lap(state.step * cfg.batch_tokens))
        advance(cfg.batch_tokens)
        if last or stopping or _passed(cfg.checkpoint_tokens, state.step, cfg.batch_tokens):
            checkpoint(state)
        if stopping and not last:
            raise InterruptedRun(
                f"{cfg.steps} steps",
                found=f"a request to stop after step {state.step}",
                where="train",
                fix="run the same command again: it continues from the checkpoint made now",
            )


def _step(cfg: TrainConfig, state: TrainState, pair: Pair, ranks: Ranks) -> tuple[BatchResult, torch.Tensor]:
    """One update; returns what the batch gave and the gradient's norm before clipping."""
    tokens = (state.step + 1) * cfg.batch_tokens
    moment = Moment(tokens, state.dead(cfg.dead_tokens), state.density)
    result = evaluate_batch(state.transcoder, *pair, cfg, moment)
    for name, term in result.terms.items():
        _require_finite(term, f"{name} term of the loss", state.step)
    parameters = state.optimizer.parameters
    result.loss.backward()
    parallel.average_gradients(parameters, ranks)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optimizer.clip_norm)
    _require_finite(grad_norm, "gradient norm", state.step)
    state.optimizer.step(
        schedules.learning_rate(
            tokens,
            peak=cfg.lr,
            total=cfg.steps * cfg.batch_tokens,
            warmup=cfg.warmup_tokens,
            decay_share=cfg.decay_share,
            kind=cfg.schedule,
        )
    )
    return result, grad_norm


def _require_finite(value: torch.Tensor, name: str, step: int) -> None:
    if not torch.isfinite(value):
        raise DivergedError(
            f"a finite {name}",
            found=f"{value.item()} at step {step}",
            where="train",
            fix="lower train.lr or the coefficients of train.loss; the last checkpoint is from before this step",
        )


def _passed(interval: int, step: int, batch_tokens: int) -> bool:
    """Whether the last step crossed a multiple of `interval` tokens."""
    return step * batch_tokens // interval > (step - 1) * batch_tokens // interval


def _row(
    cfg: TrainConfig,
    state: TrainState,
    pair: Pair,
    result: BatchResult,
    grad_norm: torch.Tensor,
    ranks: Ranks,
) -> Row:
    """Metrics of the batch just seen, over all ranks; explained variance and L0 are from before the update."""
    transcoder = state.transcoder
    own = ExplainedVariance(transcoder.n_layers, transcoder.d_model, device=result.y_hat.device)
    own.update(pair[1], result.y_hat)
    ev = parallel.merge_explained_variance(own, ranks)
    names = list(result.terms)
    values = torch.stack([result.loss.detach(), *result.terms.values()])
    loss, *terms = parallel.average(values, ranks).tolist()
    tokens = state.step * cfg.batch_tokens
    return {
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
    }


class _Clock:
    """Speed and the share of time spent waiting for data, since the last row."""

    def __init__(self) -> None:
        self._start, self._tokens, self._waited = time.perf_counter(), None, 0.0

    def wait_for(self, read: Callable[[], Pair]) -> Pair:
        before = time.perf_counter()
        pair = read()
        self._waited += time.perf_counter() - before
        return pair

    def lap(self, tokens: int) -> Row:
        now = time.perf_counter()
        seconds = now - self._start
        speed = None if self._tokens is None else (tokens - self._tokens) / seconds
        row: Row = {"tokens_per_second": speed, "data_wait_share": self._waited / seconds}
        self._start, self._tokens, self._waited = now, tokens, 0.0
        return row
