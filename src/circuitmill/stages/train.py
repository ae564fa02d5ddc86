"""Stage `train`: a transcoder on the cached activations.

| written | what |
|---|---|
| model/ | the transcoder, scales folded in (stores/transcoders.py) |
| circuit_tracer/ | the same as a cross-layer transcoder, if `model/` is another kind that can be traced |
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuitmill import distributed, logs
from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import Transcoder
from circuitmill.distributed import Ranks
from circuitmill.errors import UpstreamError
from circuitmill.lm.stream import ExpectedModel, LiveBlocks
from circuitmill.lm.targets import mlp_targets
from circuitmill.stores.activations import NORMALIZATION, ActivationStore
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.checkpoints import Checkpoints
from circuitmill.stores.clt import save_clt
from circuitmill.stores.files import digest_of
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.stores.normalization import load_normalization
from circuitmill.stores.tokens import TokenStore
from circuitmill.stores.transcoders import as_clt, is_plain_clt, save_transcoder
from circuitmill.training import parallel
from circuitmill.training.batches import Batches, Targets
from circuitmill.training.interrupt import StopRequest
from circuitmill.training.loop import train
from circuitmill.training.monitor import MetricsFile, Row, Sink, read_metrics
from circuitmill.training.state import TrainState, start

METRICS = "metrics.jsonl"
MODEL = "model"
TRACED = "circuit_tracer"
WANDB = "wandb"
"""Not in the manifest: it names the machine and the time."""

_log = logging.getLogger(__name__)


def run(cfg: TrainConfig, *, tokenize: Path, cache: Path, toyworld: Path | None = None, out: Path) -> Manifest:
    """Train, or continue a training, and write the finished transcoder.

    The language model is loaded only if the cache has no targets or no activations at all.

    Raises:
        UpstreamError: the cache is missing, incomplete or of another revision.
        StoreError: a chunk of the cache or the last checkpoint is damaged.
        ConfigError: the ranks cannot share a batch equally, or the cache is smaller than a batch.
        DivergedError: the loss is not finite.
        InterruptedRun: a signal asked to stop; a checkpoint has been made.
    """
    ranks = distributed.current()
    inputs = load_upstreams(toyworld=toyworld, tokenize=tokenize, cache=cache)
    parallel.batch_slice(cfg.batch_tokens, ranks)
    output = StageOutput("train", cfg, inputs, out, keep=(WANDB,)) if ranks.first else None
    parallel.wait_for_all(ranks)  # until rank 0 has cleared what another configuration left
    normalization = load_normalization(inputs["cache"].checked_file(NORMALIZATION))
    scaling = normalization.scaling(cfg.scaling)
    state = _train(cfg, inputs, scaling, out, ranks)
    if output is not None:
        _save(cfg, fold(state.transcoder, scaling.to(state.idle.device)), inputs["cache"], output)
        output.finish(_counts(cfg, state, read_metrics(out / METRICS)[-1]))
    parallel.wait_for_all(ranks)
    return load_manifest(out / "manifest.json", "train")


def _save(cfg: TrainConfig, transcoder: Transcoder, cache: Manifest, output: StageOutput) -> None:
    """The finished transcoder, and what circuit-tracer reads of it if that is another file."""
    name = cache.config["model"]["name"]
    label = {"scan": f"{name}-{cfg.architecture.topology}", "model_name": name}
    save_transcoder(output.path(MODEL), transcoder, **label)
    if not is_plain_clt(transcoder) and not transcoder.architecture.untraceable:
        save_clt(output.path(TRACED), as_clt(transcoder), **label)


@dataclass(frozen=True)
class _Data:
    """Where activations come from."""

    source: BatchSource
    targets: Targets | None
    """Computes MLP outputs, if the source has inputs alone."""
    live: LiveBlocks | None
    """The running model, if nothing is stored; not entered yet."""


def _data(cfg: TrainConfig, inputs: dict[str, Manifest], ranks: Ranks) -> _Data:
    """The train split, from disk or from the model."""
    cache, world = inputs["cache"], inputs.get("toyworld")
    cached = decode(CacheConfig, cache.config, "cache")
    order: dict[str, Any] = {"seed": cfg.seed, "batch_tokens": cfg.batch_tokens, "pool_tokens": cfg.pool_tokens}
    order["rows"] = parallel.batch_slice(cfg.batch_tokens, ranks)
    targets = None
    if cached.targets == "recomputed":
        targets = mlp_targets(cached.model, toyworld=world.folder if world else None, device=distributed.device())
    if cached.mode == "stream":
        live = _live_blocks(cached, inputs)
        return _Data(BatchSource(live, **order), targets, live)
    store = ActivationStore.open(cache)
    if targets is not None:
        _require_same_mlps(targets.digest, store.shards("train")[0].attributes["mlp_digest"], cached.model.name)
    return _Data(store.batches(**order), targets, None)


def _require_same_mlps(found: str, expected: str, model: str) -> None:
    if found != expected:
        raise UpstreamError(
            f"the MLPs that the cache was made with ({expected[:12]})",
            found=found[:12],
            where=f"cache.model.name: {model}",
            fix="run stage cache again with this model",
        )


def _live_blocks(cached: CacheConfig, inputs: dict[str, Manifest]) -> LiveBlocks:
    """The train split as far as the cache's budget goes, computed while the transcoder trains."""
    counts, world = inputs["cache"].counts, inputs.get("toyworld")
    tokens = TokenStore.open(inputs["tokenize"])
    model = ExpectedModel(
        cached.model,
        world.folder if world else None,
        str(distributed.device()),
        n_layers=counts["n_layers"],
        d_model=counts["d_model"],
        digest=counts["model_digest"],
    )
    return LiveBlocks(
        model,
        tokens.read("train", 0, cached.n_sequences("train", tokens.n_sequences("train"), tokens.context)),
        bos_id=tokens.bos_id,
        batch_sequences=cached.batch_sequences,
        outputs=cached.targets == "stored",
    )


def _train(cfg: TrainConfig, inputs: dict[str, Manifest], scaling: Scaling, out: Path, ranks: Ranks) -> TrainState:
    """Run the loop between store, checkpoints and sinks."""
    checkpoints = Checkpoints(out / "checkpoints", keep=cfg.keep_checkpoints)
    with ExitStack() as stack:
        data = _data(cfg, inputs, ranks)
        source = stack.enter_context(data.source)
        batches = stack.enter_context(Batches(source, scaling, device=distributed.device(), targets=data.targets))
        if data.live is not None:
            # last in, first out: otherwise leaving waits until a whole pool is computed
            stack.enter_context(data.live)
        state = start(cfg, *(parallel.gather_rows(side, ranks) for side in batches.get(0)))
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
