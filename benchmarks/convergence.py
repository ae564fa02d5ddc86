"""What does a cheaper way of training cost in loss, at equal tokens and at equal seconds?

    python -m benchmarks.convergence [--run results/demo]
    python -m benchmarks.convergence --options optimizer.moments=bf16 optimizer.precision=bf16 optimizer.lazy=true

Trains the demo's JumpReLU and BatchTopK transcoders several times from the same seeds, with the products of all
activations and with those of the few that are not zero; or, with `--options`, the default against each set of options
(key=value,key=value). On one thread; on a finished run's cache or, where `--run` is no run, on one that is made there
in two and a half minutes: the embedded model after a sixth of its pretraining.

Held-out loss, explained variance and L0 are those of the training's own nonlinearity, on batches as large as the
training's. Equal seconds: the slower of two is trained again with as many tokens as it takes in the other's seconds,
its schedule included. Seconds are of the processor, without measurements. One JSON line per training; then one per
kind and option with means, standard deviations over seeds, and the mean difference from the default of the same seed in
units of the default's standard deviation.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from circuitmill.config.cache import CacheConfig
from circuitmill.config.calibrate import CalibrateConfig
from circuitmill.config.compose import compose
from circuitmill.config.decode import decode
from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.config.train import TrainConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.errors import ConfigError
from circuitmill.stages import cache, calibrate, tokenize, toyworld
from circuitmill.stages.train_data import TrainData
from circuitmill.stores.activations import NORMALIZATION
from circuitmill.stores.manifest import load_upstreams
from circuitmill.stores.normalization import load_normalization
from circuitmill.training.batches import Pair
from circuitmill.training.heldout import moment_of
from circuitmill.training.loop import train
from circuitmill.training.objective import evaluate_batch
from circuitmill.training.parallel.layout import alone
from circuitmill.training.state import TrainState, start

KINDS = {"jumprelu": "default", "batch_topk": "batch_topk"}
"""Name -> option file of train."""
HELD_OUT = 16_384
"""Tokens."""
STAGES = ("toyworld", "tokenize", "cache")


def make_activations(run: Path) -> None:
    """The demo's embedded model, pretrained for a sixth of the time, and its activations."""
    plain = compose(
        [
            "toyworld.corpus.documents=40_000",
            "toyworld.pretrain.tokens=1_000_000",
            "toyworld.pretrain.extensions=0",
            "cache.train_shards=1",
            "cache.train_tokens=400_000",
            "cache.heldout_tokens=20_000",
        ]
    )
    # it has not learned its tasks yet
    plain["toyworld"]["accept"] = {}
    folders = {name: run / name for name in (*STAGES, "calibrate")}
    manifests = {name: folder / "manifest.json" for name, folder in folders.items()}
    world = {"toyworld": manifests["toyworld"]}
    toyworld.run(decode(ToyworldConfig, plain["toyworld"], "toyworld"), out=folders["toyworld"])
    tokenize.run(decode(TokenizeConfig, plain["tokenize"], "tokenize"), **world, out=folders["tokenize"])
    text = world | {"tokenize": manifests["tokenize"]}
    calibrate.run(decode(CalibrateConfig, plain["calibrate"], "calibrate"), **text, out=folders["calibrate"])
    cfg, whole = decode(CacheConfig, plain["cache"], "cache"), text | {"calibrate": manifests["calibrate"]}
    for shard in cfg.units():
        cache.run_unit(cfg, shard=shard, **whole, out=folders["cache"] / "shard" / shard)
    cache.run(cfg, **whole, out=folders["cache"])


def activations_of(run: Path) -> TrainData:
    """Those of a run, which is made if there is none."""
    if not (run / "cache" / "manifest.json").is_file():
        make_activations(run)
    inputs = load_upstreams(**{name: run / name / "manifest.json" for name in STAGES})
    return TrainData(inputs, load_normalization(inputs["cache"].checked_file(NORMALIZATION)).scaling("rms"))


def configured(kind: str, options: str, tokens: int, seed: int) -> TrainConfig:
    """An option file with changes, for a short training.

    Args:
        kind: Which file.
        options: key=value, separated by commas; keys with dots, without `train`.
        tokens: Length.
        seed: Of starting values and order.

    Raises:
        ConfigError: an option does not exist, or does not go with this kind.
    """
    plain = compose([f"train={KINDS[kind]}"])["train"]
    plain |= {"tokens": tokens, "seed": seed, "warmup_tokens": tokens // 10, "dead_tokens": 100_000}
    plain |= {"checkpoint_tokens": tokens, "wandb": False}
    plain["monitor"] |= {"heldout_tokens": 0, "behaviour_tokens": 0, "log_tokens": tokens}
    for pair in filter(None, options.split(",")):
        keys, _, value = pair.partition("=")
        *groups, key = keys.split(".")
        part = plain
        for group in groups:
            part = part.setdefault(group, {})
        part[key] = yaml.safe_load(value)
    return decode(TrainConfig, plain, "train")


def trained(cfg: TrainConfig, data: TrainData, held_out: list[Pair]) -> dict[str, float]:
    """What a training reaches, and its seconds."""
    hooks: dict[str, Any] = {"log": lambda row: None, "checkpoint": lambda state, l0=None: None}
    hooks |= {"advance": lambda tokens: None, "stop": lambda: False}
    layout = alone(cfg.n_features)
    with ExitStack() as stack:
        batches = data.batches(cfg, layout, stack)
        state = start(cfg, *batches.get(0))
        before = time.process_time()
        train(cfg, state, batches, layout=layout, **hooks)
        seconds = time.process_time() - before
    return {"tokens": state.step * cfg.batch_tokens, "seconds": seconds} | measured(cfg, state, held_out)


@torch.no_grad()
def measured(cfg: TrainConfig, state: TrainState, held_out: list[Pair]) -> dict[str, float]:
    """Held-out figures; the loss is weighed as at the end of the training."""
    transcoder, moment = state.transcoder, moment_of(state, cfg)
    explained = ExplainedVariance(transcoder.n_layers, transcoder.d_model)
    losses, fired = [], []
    for x, y in held_out:
        result = evaluate_batch(transcoder, x, y, cfg, moment)
        explained.update(y, result.y_hat)
        losses.append(result.loss.item())
        fired.append(result.l0.mean().item())
    return {"loss": statistics.mean(losses), "ev": explained.pooled(), "l0": statistics.mean(fired)}


def shorter(tokens: int, seconds: float, given: float, batch_tokens: int) -> int:
    """Tokens of whole batches that fit in the given seconds, at the speed of so many tokens in so many seconds."""
    return max(1, int(tokens * given / seconds) // batch_tokens) * batch_tokens


class Comparison:
    """Trainings of a kind: a baseline, and options."""

    def __init__(self, kind: str, data: TrainData, tokens: int, seeds: int) -> None:
        self._kind, self._tokens, self._seeds = kind, tokens, range(seeds)
        self._data, self._held_out = data, list(data.heldout(tokens=HELD_OUT, batch_tokens=1024, key="HELD_OUT"))

    def report(self, baseline: str, options: list[str]) -> None:
        """All trainings, seeds in the outer loop, so that options alternate; then how they differ."""
        possible = [each for each in options if self._possible(each)]
        if not possible:
            return
        found: dict[str, list[dict[str, float]]] = {each: [] for each in (baseline, *possible)}
        for seed in self._seeds:
            for each, rows in found.items():
                rows.append(self._trained(each, self._tokens, seed))
        for each in possible:
            self._compare({"baseline": baseline, "option": each}, found[baseline], found[each])

    def _possible(self, options: str) -> bool:
        try:
            configured(self._kind, options, self._tokens, 0)
        except ConfigError as error:
            print(json.dumps({"kind": self._kind, "options": options, "refused": str(error)}), flush=True)
            return False
        return True

    def _trained(self, options: str, tokens: int, seed: int) -> dict[str, float]:
        row = trained(configured(self._kind, options, tokens, seed), self._data, self._held_out)
        print(json.dumps({"kind": self._kind, "options": options, "seed": seed} | rounded(row)), flush=True)
        return row

    def _compare(self, names: dict[str, str], base: list[dict], option: list[dict]) -> None:
        tokens = base[0]["tokens"]
        seconds = [statistics.mean(row["seconds"] for row in rows) for rows in (base, option)]
        equal = {"at": "equal tokens", "speedup": round(seconds[0] / seconds[1], 3)}
        print(json.dumps({"kind": self._kind} | names | equal | difference(base, option)), flush=True)
        slower, name = (base, "baseline") if seconds[0] > seconds[1] else (option, "option")
        fewer = shorter(tokens, max(seconds), min(seconds), 1024)
        if fewer == tokens:
            return
        again = [self._trained(names[name], fewer, seed) for seed in self._seeds]
        both = (again, option) if slower is base else (base, again)
        equal = {"at": "equal seconds", "shortened": name, "shortened_tokens": fewer}
        print(json.dumps({"kind": self._kind} | names | equal | difference(*both)), flush=True)


def difference(base: list[dict], option: list[dict]) -> dict[str, dict[str, float | None]]:
    """Means, standard deviations over seeds, and the mean difference of the same seed in units of the baseline's."""
    found = {}
    for key in ("loss", "ev", "l0"):
        values = [[row[key] for row in rows] for rows in (base, option)]
        deviations = [statistics.stdev(each) if len(each) > 1 else None for each in values]
        mean = statistics.mean(b - a for a, b in zip(*values, strict=True))
        found[key] = {
            "baseline": round(statistics.mean(values[0]), 5),
            "option": round(statistics.mean(values[1]), 5),
            "baseline_sd": None if deviations[0] is None else round(deviations[0], 6),
            "option_sd": None if deviations[1] is None else round(deviations[1], 6),
            "difference": round(mean, 6),
            "difference_in_sd": round(mean / deviations[0], 2) if deviations[0] else None,
        }
    return found


def rounded(row: dict[str, float]) -> dict[str, float]:
    """As printed."""
    return {key: round(value, 5) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("results/convergence"))
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--options", nargs="*", help="sets of key=value; without any, sparse products against dense")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = activations_of(arguments.run)
    baseline, options = ("", arguments.options) if arguments.options else ("products=dense", ["products=sparse"])
    for kind in arguments.kind:
        Comparison(kind, data, arguments.tokens, arguments.seeds).report(baseline, options)


if __name__ == "__main__":
    main()
