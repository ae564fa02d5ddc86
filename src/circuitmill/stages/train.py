"""Stage `train`: a transcoder on the cached activations.

| written | what |
|---|---|
| model/ | the transcoder, scales folded in (stores/transcoders.py) |
| circuit_tracer/ | the same as a cross-layer transcoder, if `model/` is another kind that can be traced |
| metrics.jsonl | a row per `train.monitor.log_tokens`: of the batch at hand, and now and then of held-out tokens |
| throughput.jsonl | speed and memory at the same steps; not part of what the training is (stores/metrics.py) |
| checkpoints/ | newest states of the training, to continue from, and those of `checkpoint_l0` (stores/checkpoints.py) |
| profile/ | a trace per rank, with `train.monitor.profile_steps` |
| wandb/ | the same metrics for Weights & Biases, if asked for |

Started by torchrun with any number of processes, or without it as one process. All ranks train on their share
of every batch; rank 0 writes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from circuitmill import distributed, logs
from circuitmill.config.train import TrainConfig
from circuitmill.core.adapters import merged
from circuitmill.core.conversion import set_thresholds
from circuitmill.core.scaling import fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.distributed import Ranks
from circuitmill.errors import UpstreamError
from circuitmill.stages.train_data import TrainData
from circuitmill.stages.train_plan import situation_of
from circuitmill.stores.activations import NORMALIZATION
from circuitmill.stores.checkpoints import Checkpoints, Saved
from circuitmill.stores.clt import save_clt
from circuitmill.stores.files import digest_of
from circuitmill.stores.manifest import Manifest, StageOutput, identity, load_manifest, load_upstreams, plain
from circuitmill.stores.metrics import METRICS, THROUGHPUT, Row, read_metrics
from circuitmill.stores.normalization import load_normalization
from circuitmill.stores.transcoders import MODEL, TRACED, as_clt, is_plain_clt, load_transcoder, save_transcoder
from circuitmill.training.batches import Batches
from circuitmill.training.finetune import state_from_base
from circuitmill.training.heldout import HeldOut, moment_of
from circuitmill.training.interrupt import StopRequest
from circuitmill.training.loop import Ended, peak_memory, train
from circuitmill.training.monitor import MetricsFile, Sink
from circuitmill.training.parallel.census import Shape
from circuitmill.training.parallel.choose import choose
from circuitmill.training.parallel.cut import join
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.parallel.placement import Placement
from circuitmill.training.parallel.plan import Estimate
from circuitmill.training.sequences import SequenceBatches
from circuitmill.training.state import TrainState, start
from circuitmill.training.thresholds import WITH_THRESHOLDS, kept_thresholds

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
    normalization = load_normalization(inputs["cache"].checked_file(NORMALIZATION))
    data = TrainData(inputs, normalization.scaling(cfg.scaling))
    layout, planned = _layout(cfg, data, ranks)
    own = {"keep": (WANDB, PROFILE), "volatile": (THROUGHPUT,)}
    output = StageOutput("train", cfg, inputs, out, **own) if ranks.first else None
    layout.world.wait()  # until rank 0 has cleared what another configuration left
    before = peak_memory(distributed.device())
    state, ended = _train(cfg, data, out, layout)
    if ranks.first:
        _compare(planned, read_metrics(out / METRICS)[-1], before)
    whole = _whole(cfg, state, data, layout)
    if output is not None and whole is not None:
        trained = merged(whole) if cfg.adapter_rank else whole
        _save(cfg, fold(trained, data.scaling), inputs["cache"], output)
        output.finish(_counts(cfg, state, trained, read_metrics(out / METRICS)[-1]) | {"ended": ended.reason})
    layout.world.wait()
    return load_manifest(out / "manifest.json", "train")


def _layout(cfg: TrainConfig, data: TrainData, ranks: Ranks) -> tuple[Layout, Estimate]:
    """What the configuration names, or what fits.

    Raises:
        ConfigError: these ranks cannot train this transcoder so.
    """
    shape, device = Shape(*data.scaling.input_scale.shape), distributed.device()
    situation = situation_of(cfg, data.cached, shape, device.type)
    return choose(cfg, shape, ranks, device=device, situation=situation)


def _compare(planned: Estimate, last: Row, before: int) -> None:
    """Say what the training needed, beside what was planned.

    Args:
        planned: Before it began.
        last: Row of metrics.
        before: Most memory that the process had held until then.
    """
    need = 0 if planned.memory is None else planned.memory.peak
    _log.info(
        "peak memory %.2f GB, %.2f above what there was before the training; planned %.2f, with reserve %.2f",
        last["peak_memory_bytes"] / 1e9,
        (last["peak_memory_bytes"] - before) / 1e9,
        need / 1e9,
        planned.total / 1e9,
    )
    if "wire_bytes_per_step" in last:
        step, dead = (sum(part.values()) for part in (planned.payload.step, planned.payload.dead))
        sent = last["wire_bytes_per_step"]
        _log.info("%.0f bytes sent per step; planned %d, and %d more while features are dead", sent, step, dead)


def _require_base(cfg: TrainConfig, base: Path | None) -> None:
    if bool(cfg.base) != (base is not None):
        raise UpstreamError(
            f"the output of training {cfg.base}" if cfg.base else "no other training: train.base is empty",
            found="none" if base is None else str(base),
            where="--base",
            fix="pass its manifest.json" if cfg.base else "leave --base out, or set train.base",
        )


def _whole(cfg: TrainConfig, state: TrainState, data: TrainData, layout: Layout) -> Transcoder | None:
    """The finished transcoder in normalised units, in the first rank's host memory; None on the others.

    Features get thresholds with which as many fire on held-out tokens as the nonlinearity keeps there. ReLU and
    JumpReLU have theirs.
    """
    shards = layout.features.size > 1
    if shards:
        _set_thresholds(cfg, state, state.transcoder, data, layout)
    whole = join(state.transcoder, layout, cfg.architecture)
    if whole is not None and not shards:
        whole = whole.to(state.idle.device)
        _set_thresholds(cfg, state, whole, data, layout)
    return None if whole is None else whole.cpu()


def _set_thresholds(
    cfg: TrainConfig, state: TrainState, transcoder: Transcoder, data: TrainData, layout: Layout
) -> None:
    own = cfg.nonlinearity
    if own.name in WITH_THRESHOLDS:
        return
    key = "train.nonlinearity.calibration_tokens"
    pairs = data.heldout(tokens=own.calibration_tokens, batch_tokens=cfg.batch_tokens, key=key)
    found = kept_thresholds(transcoder, list(pairs), cfg, moment_of(state, cfg), layout)
    set_thresholds(transcoder, found)


def _save(cfg: TrainConfig, transcoder: Transcoder, cache: Manifest, output: StageOutput) -> None:
    """The finished transcoder, and what circuit-tracer reads of it if that is another file."""
    name = cache.config["model"]["name"]
    label = {"scan": f"{name}-{cfg.architecture.topology}", "model_name": name}
    save_transcoder(output.path(MODEL), transcoder, **label)
    if not is_plain_clt(transcoder) and not transcoder.architecture.untraceable:
        save_clt(output.path(TRACED), as_clt(transcoder), **label)


def _beginning(cfg: TrainConfig, data: TrainData, batches: Batches | SequenceBatches, layout: Layout) -> TrainState:
    """Starting values, or the base's."""
    device = distributed.device()
    if "base" in data.inputs:
        base = load_transcoder(data.inputs["base"].folder / MODEL).to(device)
        return state_from_base(cfg, base, data.scaling.to(device), layout)
    if isinstance(batches, SequenceBatches):
        x, y = batches.beginning()
    else:
        x, y = (layout.data.gather_rows(side) for side in batches.get(0))
    return start(cfg, x, y, layout)


def _measurement(cfg: TrainConfig, data: TrainData, layout: Layout) -> Callable[[TrainState], Row] | None:
    """What is measured now and then: by the ranks that share features, or by rank 0 while the others wait."""
    own = cfg.monitor
    behaves = bool(own.behaviour_tokens) and not cfg.architecture.unreplaceable
    if not own.heldout_tokens and not behaves:
        return None
    held_out = None
    if layout.measures:
        key = "train.monitor.heldout_tokens"
        pairs = data.heldout(tokens=own.heldout_tokens, batch_tokens=cfg.batch_tokens, key=key)
        replaced = _replaced(data, own.behaviour_tokens, layout) if behaves else None
        held_out = HeldOut(list(pairs), cfg, scaling=data.scaling, replaced=replaced, layout=layout)

    def measure(state: TrainState) -> Row:
        with state.gathered():
            return held_out.measure(state) if held_out is not None else {}

    return measure


def _replaced(data: TrainData, tokens: int, layout: Layout) -> Callable[[Transcoder], Mapping[str, float | None]]:
    """Measures the replacement model; other ranks bring their shards and have no language model."""
    return data.replaced(tokens) if layout.ranks.first else lambda whole: {}


def _restore(state: TrainState, saved: Saved, layout: Layout) -> None:
    """Take over a checkpoint, of whatever layout."""
    placement = Placement(state.transcoder, layout)
    wanted = placement.wanted(saved.entries)
    saved.read(wanted)
    state.restore(placement.tensors(wanted))


def _train(cfg: TrainConfig, data: TrainData, out: Path, layout: Layout) -> tuple[TrainState, Ended]:
    """Run the loop between store, checkpoints and sinks."""
    ranks = layout.ranks
    with ExitStack() as stack:
        batches = data.batches(cfg, layout, stack)
        state = _beginning(cfg, data, batches, layout)
        checkpoints = stack.enter_context(
            Checkpoints(
                out / "checkpoints",
                keep=cfg.keep_checkpoints,
                rank=ranks.rank,
                size=ranks.size,
                group=layout.background,
            )
        )
        found = checkpoints.last()
        if found is not None:
            _log.info("continuing after step %d of %d", found.step, cfg.steps)
            _restore(state, found, layout)
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
            placement = Placement(state.transcoder, layout)
            checkpoints.save(state.step, placement.entries(state.tensors()), l0)

        ended = train(
            cfg,
            state,
            batches,
            layout=layout,
            log=log,
            checkpoint=checkpoint,
            advance=bar.advance,
            stop=lambda: bool(stop),
            measure=_measurement(cfg, data, layout),
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

        config = identity(cfg)
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
        "dead": state.n_dead,
    }
