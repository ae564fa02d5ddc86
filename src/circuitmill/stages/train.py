"""Stage `train`: a transcoder on the cached activations.

| written | what |
|---|---|
| model/ | the transcoder, scales folded in (stores/transcoders.py) |
| circuit_tracer/ | the same as a cross-layer transcoder, if `model/` is another kind that can be traced |
| metrics.jsonl | a row per `train.monitor.log_tokens`: of the batch at hand, and now and then of held-out tokens |
| checkpoints/ | newest states of the training, to continue from, and those of `checkpoint_l0` (stores/checkpoints.py) |
| profile/ | a trace per rank, with `train.monitor.profile_steps` |
| wandb/ | the same metrics for Weights & Biases, if asked for |

Started by torchrun with any number of processes, or without it as one process. All ranks train on their share
of every batch; rank 0 writes.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from circuitmill import distributed, logs
from circuitmill.config.train import TrainConfig
from circuitmill.core.adapters import merged
from circuitmill.core.conversion import set_thresholds
from circuitmill.core.scaling import fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.distributed import Ranks
from circuitmill.errors import UpstreamError
from circuitmill.stages.train_data import TrainData
from circuitmill.stores.activations import NORMALIZATION
from circuitmill.stores.checkpoints import Checkpoints
from circuitmill.stores.clt import save_clt
from circuitmill.stores.files import digest_of
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.stores.normalization import load_normalization
from circuitmill.stores.transcoders import MODEL, TRACED, as_clt, is_plain_clt, load_transcoder, save_transcoder
from circuitmill.training import parallel
from circuitmill.training.batches import Batches
from circuitmill.training.finetune import state_from_base
from circuitmill.training.heldout import HeldOut
from circuitmill.training.interrupt import StopRequest
from circuitmill.training.loop import Ended, train
from circuitmill.training.monitor import MetricsFile, Row, Sink, read_metrics
from circuitmill.training.objective import Moment
from circuitmill.training.sequences import SequenceBatches
from circuitmill.training.state import TrainState, start
from circuitmill.training.thresholds import WITH_THRESHOLDS, kept_thresholds

METRICS = "metrics.jsonl"
PROFILE = "profile"
WANDB = "wandb"
"""Not in the manifest, as the profile: they name the machine and the time."""

_log = logging.getLogger(__name__)


def run(
    cfg: TrainConfig,
    *,
    tokenize: Path,
    cache: Path,
    toyworld: Path | None = None,
    base: Path | None = None,
    out: Path,
) -> Manifest:
    """Train, or continue a training, and write the finished transcoder.

    The language model is loaded only if the cache lacks something, the loss or a measurement runs it.

    Args:
        base: The training whose transcoder this one starts from, if `cfg.base` names one.

    Raises:
        UpstreamError: the cache is missing, incomplete or of another revision, or there is no base where one is named.
        StoreError: a chunk of the cache or the last checkpoint is damaged.
        ConfigError: the ranks cannot share a batch equally, the cache is smaller than a batch, or the base does not
            fit.
        DivergedError: the loss is not finite.
        InterruptedRun: a signal asked to stop; a checkpoint has been made.
    """
    ranks = distributed.current()
    _require_base(cfg, base)
    inputs = load_upstreams(toyworld=toyworld, tokenize=tokenize, cache=cache)
    if base is not None:
        inputs["base"] = load_manifest(base, "train")
    parallel.batch_slice(cfg.batch_tokens, ranks)
    output = StageOutput("train", cfg, inputs, out, keep=(WANDB, PROFILE)) if ranks.first else None
    parallel.wait_for_all(ranks)  # until rank 0 has cleared what another configuration left
    normalization = load_normalization(inputs["cache"].checked_file(NORMALIZATION))
    data = TrainData(inputs, normalization.scaling(cfg.scaling))
    state, ended = _train(cfg, data, out, ranks)
    if output is not None:
        _set_thresholds(cfg, state, data)
        trained = merged(state.transcoder) if cfg.adapter_rank else state.transcoder
        _save(cfg, fold(trained, data.scaling.to(state.idle.device)), inputs["cache"], output)
        output.finish(_counts(cfg, state, trained, read_metrics(out / METRICS)[-1]) | {"ended": ended.reason})
    parallel.wait_for_all(ranks)
    return load_manifest(out / "manifest.json", "train")


def _require_base(cfg: TrainConfig, base: Path | None) -> None:
    if bool(cfg.base) != (base is not None):
        raise UpstreamError(
            f"the output of training {cfg.base}" if cfg.base else "no other training: train.base is empty",
            found="none" if base is None else str(base),
            where="--base",
            fix="pass its manifest.json" if cfg.base else "leave --base out, or set train.base",
        )


def _set_thresholds(cfg: TrainConfig, state: TrainState, data: TrainData) -> None:
    """Give features thresholds with which as many fire on held-out tokens as the nonlinearity keeps there.

    ReLU and JumpReLU have theirs.
    """
    own, transcoder = cfg.nonlinearity, state.transcoder
    if own.name in WITH_THRESHOLDS:
        return
    moment = Moment(state.step * cfg.batch_tokens, state.dead(cfg.dead_tokens), state.density)
    pairs = data.heldout(
        tokens=own.calibration_tokens,
        batch_tokens=cfg.batch_tokens,
        key="train.nonlinearity.calibration_tokens",
    )
    set_thresholds(transcoder, kept_thresholds(transcoder, list(pairs), cfg, moment))


def _save(cfg: TrainConfig, transcoder: Transcoder, cache: Manifest, output: StageOutput) -> None:
    """The finished transcoder, and what circuit-tracer reads of it if that is another file."""
    name = cache.config["model"]["name"]
    label = {"scan": f"{name}-{cfg.architecture.topology}", "model_name": name}
    save_transcoder(output.path(MODEL), transcoder, **label)
    if not is_plain_clt(transcoder) and not transcoder.architecture.untraceable:
        save_clt(output.path(TRACED), as_clt(transcoder), **label)


def _beginning(cfg: TrainConfig, data: TrainData, batches: Batches | SequenceBatches, ranks: Ranks) -> TrainState:
    """Starting values, or the base's."""
    device = distributed.device()
    if "base" in data.inputs:
        base = load_transcoder(data.inputs["base"].folder / MODEL).to(device)
        return state_from_base(cfg, base, data.scaling.to(device))
    if isinstance(batches, SequenceBatches):
        return start(cfg, *batches.beginning())
    return start(cfg, *(parallel.gather_rows(side, ranks) for side in batches.get(0)))


def _measurement(cfg: TrainConfig, data: TrainData, ranks: Ranks) -> Callable[[TrainState], Row] | None:
    """What is measured now and then; by rank 0, while the others wait."""
    own = cfg.monitor
    behaves = bool(own.behaviour_tokens) and not cfg.architecture.unreplaceable
    if not own.heldout_tokens and not behaves:
        return None
    if not ranks.first:
        return lambda state: {}
    key = "train.monitor.heldout_tokens"
    pairs = data.heldout(tokens=own.heldout_tokens, batch_tokens=cfg.batch_tokens, key=key)
    replaced = data.replaced(own.behaviour_tokens) if behaves else None
    return HeldOut(list(pairs), cfg, scaling=data.scaling, replaced=replaced).measure


def _train(cfg: TrainConfig, data: TrainData, out: Path, ranks: Ranks) -> tuple[TrainState, Ended]:
    """Run the loop between store, checkpoints and sinks."""
    checkpoints = Checkpoints(out / "checkpoints", keep=cfg.keep_checkpoints)
    with ExitStack() as stack:
        batches = data.batches(cfg, ranks, stack)
        state = _beginning(cfg, data, batches, ranks)
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

        def checkpoint(state: TrainState, l0: float | None = None) -> None:
            if ranks.first:
                checkpoints.save(state.step, state.tensors(), l0)

        ended = train(
            cfg,
            state,
            batches,
            ranks=ranks,
            log=log,
            checkpoint=checkpoint,
            advance=bar.advance,
            stop=lambda: bool(stop),
            measure=_measurement(cfg, data, ranks),
            trace=out / PROFILE / f"rank-{ranks.rank}.json" if cfg.monitor.profile_steps else None,
        )
    return state, ended


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


def _counts(cfg: TrainConfig, state: TrainState, transcoder: Transcoder, last: Row) -> dict:
    """Shapes and the figures of the last batch; held-out figures are stage evaluate's."""
    return {
        "steps": state.step,
        "tokens": state.step * cfg.batch_tokens,
        "architecture": plain(cfg.architecture),
        "n_layers": transcoder.n_layers,
        "n_sources": transcoder.n_sources,
        "n_features": transcoder.n_features,
        "d_model": transcoder.d_model,
        "parameters": sum(parameter.numel() for parameter in transcoder.parameters()),
        "ev": last["ev"],
        "ev_per_layer": last["ev_per_layer"],
        "l0": last["l0"],
        "dead": int(torch.sum(state.dead(cfg.dead_tokens))),
    }
