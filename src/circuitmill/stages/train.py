"""Stage `train`: a JumpReLU cross-layer transcoder on the cached activations.

| written | what |
|---|---|
| model/ | the transcoder in circuit-tracer's layout, scales folded in (stores/clt.py) |
| metrics.jsonl | a row per `train.log_tokens`: loss terms, explained variance, L0 and more, of the batch at
hand |
| checkpoints/ | newest states of the training, to continue from (stores/checkpoints.py) |
| wandb/ | the same metrics for Weights & Biases, if asked for |

Started by torchrun with any number of processes, or without it as one process. All ranks train on their share
of every batch; rank 0 writes.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from circuitmill import distributed, logs
from circuitmill.config.train import TrainConfig
from circuitmill.core.scaling import Scaling, fold
from circuitmill.distributed import Ranks
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.checkpoints import Checkpoints
from circuitmill.stores.clt import save_clt
from circuitmill.stores.files import digest_of
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.training import parallel
from circuitmill.training.batches import Batches
from circuitmill.training.interrupt import StopRequest
from circuitmill.training.loop import train
from circuitmill.training.monitor import MetricsFile, Row, Sink, read_metrics
from circuitmill.training.state import TrainState, start

METRICS = "metrics.jsonl"
MODEL = "model"
WANDB = "wandb"
"""Not in the manifest: it names the machine and the time."""

_log = logging.getLogger(__name__)


def run(cfg: TrainConfig, *, cache: Path, out: Path) -> Manifest:
    """Train, or continue a training, and write the finished transcoder.

    Raises:
        UpstreamError: the cache is missing, incomplete or of another revision.
        StoreError: a chunk of the cache or the last checkpoint is damaged.
        ConfigError: the ranks cannot share a batch equally, or the cache is smaller than a batch.
        DivergedError: the loss is not finite.
        InterruptedRun: a signal asked to stop; a checkpoint has been made.
    """
    ranks = distributed.current()
    inputs = load_upstreams(cache=cache)
    parallel.batch_slice(cfg.batch_tokens, ranks)
    output = StageOutput("train", cfg, inputs, out, keep=(WANDB,)) if ranks.first else None
    parallel.wait_for_all(ranks)  # until rank 0 has cleared what another configuration left
    store = ActivationStore.open(inputs["cache"])
    scaling = Scaling(store.normalization.input_scale, store.normalization.output_scale)
    state = _train(cfg, store, scaling, out, ranks)
    if output is not None:
        name = inputs["cache"].config["model"]["name"]
        save_clt(
            output.path(MODEL),
            fold(state.transcoder, scaling.to(state.idle.device)),
            scan=f"{name}-clt",
            model_name=name,
        )
        output.finish(_counts(cfg, state, read_metrics(out / METRICS)[-1]))
    parallel.wait_for_all(ranks)
    return load_manifest(out / "manifest.json", "train")


def _train(cfg: TrainConfig, store: ActivationStore, scaling: Scaling, out: Path, ranks: Ranks) -> TrainState:
    """Run the loop between store, checkpoints and sinks."""
    checkpoints = Checkpoints(out / "checkpoints", keep=cfg.keep_checkpoints)
    with ExitStack() as stack:
        source = stack.enter_context(
            store.batches(seed=cfg.seed, batch_tokens=cfg.batch_tokens, pool_tokens=cfg.pool_tokens)
        )
        batches = stack.enter_context(
            Batches(source, scaling, batch_tokens=cfg.batch_tokens, ranks=ranks, device=distributed.device())
        )
        state = start(cfg, *batches.whole(0))
        found = checkpoints.last()
        if found is not None:
            _log.info("continuing after step %d of %d", found.step, cfg.steps)
            state.restore(found.tensors)
        sinks = stack.enter_context(_sinks(cfg, out, state.step)) if ranks.first else []
        stop = stack.enter_context(StopRequest())
        bar = stack.enter_context(
            logs.progress(
                "train",
                total=cfg.steps * cfg.batch_tokens,
                unit="tokens",
                done=state.step * cfg.batch_tokens,
            )
        )

        def log(row: Row) -> None:
            for sink in sinks:
                sink.log(row)
            bar.note(f"loss {row['loss']:.3g}, EV {row['ev']:.4f}, L0 {sum(row['l0']) / len(row['l0']):.1f} per layer")

        def checkpoint(state: TrainState) -> None:
            if ranks.first:
                checkpoints.save(state.step, state.tensors())

        train(
            cfg,
            state,
            batches,
            ranks=ranks,
            log=log,
            checkpoint=checkpoint,
            advance=bar.advance,
            stop=lambda: bool(stop),
        )
    return state


@contextmanager
def _sinks(cfg: TrainConfig, out: Path, step: int) -> Iterator[list[Sink]]:
    """Where rows go; the file first, so that it is complete whatever happens to the mirror."""
    sinks: list[Sink] = [MetricsFile(out / METRICS, resume_step=step)]
    if cfg.wandb:
        # here, because importing it takes a second that trainings without it need not wait
        from circuitmill.stores.mirror import WandbMirror

        config = plain(cfg)
        sinks.append(WandbMirror(out, config=config, identity=digest_of([config, str(out.resolve())])[:16]))
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def _counts(cfg: TrainConfig, state: TrainState, last: Row) -> dict:
    """Shapes and the figures of the last batch; held-out figures are stage evaluate's."""
    transcoder = state.transcoder
    return {
        "steps": state.step,
        "tokens": state.step * cfg.batch_tokens,
        "n_layers": transcoder.n_layers,
        "n_features": transcoder.n_features,
        "d_model": transcoder.d_model,
        "parameters": sum(parameter.numel() for parameter in transcoder.parameters()),
        "ev": last["ev"],
        "ev_per_layer": last["ev_per_layer"],
        "l0": last["l0"],
        "dead": int(torch.sum(state.dead(cfg.dead_tokens))),
    }
