"""What does a training step cost: with all activations, with the few that are not zero, and at the least?

    python -m benchmarks.train_step [--shape M] [--kind jumprelu topk batch_topk] [--l0 16] [--rounds 5] [--device cuda]
    python -m benchmarks.train_step --crossover --shape S M

A step is what the trainer does with a batch in memory: loss, backward pass, norm of the gradient, update. Both ways
work on the same untied CLT in turn, and between them stand the matrix products of the dense way alone and a pass over
memory, whose rates give the floor of each round (benchmarks/step_floor.py). Ratios are within a round; figures are
medians over rounds. Seconds are of the processor on a CPU, which other work disturbs less, and of the stream on a GPU.

Inputs are normal. JumpReLU has the demo's loss without its auxiliary term, and fires as often as `--l0` says; top-k
kinds have the reconstruction alone. The kernel of JumpReLU covers places below the threshold too, which the sparse way
works on: `--near` for each place that fires. Over 200,000 tokens of the demo's training this is .45 to .77, hence the
default; the kernel is as wide as that takes. All features fire equally often, unlike those of a trained transcoder.

`--crossover` measures from which share of places the dense way is faster, which
`circuitmill.kernels.sparse.WORTHWHILE` is set from.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median, quantiles

import torch
import yaml
from benchmarks import step_floor
from benchmarks.step_floor import SHAPES, Clock, Round, Shape, Yardstick
from torch import Tensor

from circuitmill.config.decode import decode
from circuitmill.config.train import NonlinearityConfig, TrainConfig
from circuitmill.core import init
from circuitmill.core.transcoder import Transcoder
from circuitmill.kernels.entries import Entries
from circuitmill.kernels.sparse import Sparse
from circuitmill.training import objective, precision
from circuitmill.training.figures import figures_of
from circuitmill.training.parallel import census, gradients
from circuitmill.training.parallel.choose import memory_of
from circuitmill.training.parallel.layout import alone
from circuitmill.training.parallel.memory import memory
from circuitmill.training.state import TrainState, make_state

REPOSITORY = Path(__file__).parents[1]
KINDS, WAYS = ("jumprelu", "topk", "batch_topk"), ("dense", "sparse")
SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
BARS = {"jumprelu": (4.0, math.inf), "topk": (5.0, 0.25), "batch_topk": (5.0, 0.25)}
"""Shape M, 16 features per token and layer, one CPU thread: least speedup, and most time in that of the dense way's
matrix products."""
FOREVER = 10**15
"""Tokens."""
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What is measured both ways."""

    shape: str
    kind: str
    l0: float
    options: argparse.Namespace

    @property
    def sizes(self) -> Shape:
        """Of the shape of this name."""
        return SHAPES[self.shape]

    @property
    def device(self) -> torch.device:
        """Where."""
        return torch.device(self.options.device)

    @property
    def products(self) -> torch.dtype:
        """Type of the factors of matrix products."""
        return torch.float32 if self.options.precision == "float32" else torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Of a weight as it is stored."""
        return 2 if self.options.precision == "bf16" else 4

    @property
    def named(self) -> dict:
        """What a line says of it."""
        own = self.options
        row = {"shape": self.shape, "kind": self.kind, "asked_l0": self.l0, "precision": own.precision}
        row |= {"moments": own.moments, "lazy": own.lazy, "device": own.device, "threads": torch.get_num_threads()}
        return row | ({"near": own.near} if self.kind == "jumprelu" else {})


def configured(case: Case, way: str) -> TrainConfig:
    """The demo's training at another size; a rate next to nothing, so that as many features fire in all steps."""
    file = REPOSITORY / "config" / "train" / "default.yaml"
    cfg = decode(TrainConfig, yaml.safe_load(file.read_text()), "train")
    ranked, own = case.kind != "jumprelu", case.options
    terms = ("reconstruction",) if ranked else ("reconstruction", "tanh_sparsity", "pre_activation")
    return replace(
        cfg,
        n_features=case.sizes.n_features,
        batch_tokens=case.sizes.batch_tokens,
        pool_tokens=case.sizes.batch_tokens,
        tokens=FOREVER,
        checkpoint_tokens=FOREVER,
        dead_tokens=FOREVER,
        warmup_tokens=0,
        lr=1e-12,
        products=way,  # type: ignore[arg-type]
        loss={name: replace(cfg.loss[name], ramp_share=0.0) for name in terms},
        init=replace(cfg.init, l0=case.l0, encoder_bias="zero"),
        nonlinearity=NonlinearityConfig(case.kind, k=float(case.l0))
        if ranked
        else replace(cfg.nonlinearity, bandwidth=bandwidth(case)),
        optimizer=replace(cfg.optimizer, precision=own.precision, moments=own.moments, lazy=own.lazy),
    )


def spread(sizes: Shape) -> float:
    """Standard deviation of pre-activations of normal inputs: encoders are uniform within 1 / sqrt(n_features)."""
    return math.sqrt(sizes.d_model / 3 / sizes.n_features)


def bandwidth(case: Case) -> float:
    """Width of a kernel whose lower half covers as many places as are asked for, of normal pre-activations."""
    rate = case.l0 / case.sizes.n_features
    threshold, low = (
        NormalDist(0, spread(case.sizes)).inv_cdf(1 - each) for each in (rate, rate * (1 + case.options.near))
    )
    return 2 * (threshold - low)


@torch.no_grad()
def started(case: Case, cfg: TrainConfig) -> tuple[TrainState, Tensor, Tensor]:
    """A training before its first step, and a batch, made on the device."""
    sizes, device = case.sizes, case.device
    torch.manual_seed(0)
    with device:
        transcoder = Transcoder(sizes.n_layers, sizes.n_features, sizes.d_model)
        x, y = (torch.randn(sizes.batch_tokens, sizes.n_layers, sizes.d_model) for _ in range(2))
    transcoder.W_enc.uniform_(-1, 1).div_(math.sqrt(sizes.n_features))
    for block in transcoder.W_dec:
        block.uniform_(-1, 1).div_(math.sqrt(sizes.n_layers * sizes.d_model))
    learned = case.kind == "jumprelu"
    transcoder.log_threshold.requires_grad_(learned)
    transcoder.log_threshold.fill_(math.log(spread(sizes)) if learned else -math.inf)
    if learned:
        init.encoder_bias_for_rate(transcoder, x, rate=case.l0 / sizes.n_features)
    return make_state(cfg, transcoder), x, y


def step(cfg: TrainConfig, state: TrainState, x: Tensor, y: Tensor, clock: Clock) -> objective.BatchResult:
    """One update as `circuitmill.training.loop` makes it on one rank."""
    optimizer, layout = state.optimizer, alone(cfg.n_features)
    moment = objective.Moment((state.step + 1) * len(x), state.dead(cfg.dead_tokens), state.density, 0)
    with clock.phase("forward"), precision.products(cfg.optimizer.precision, x.device):
        result = objective.evaluate_batch(state.transcoder, x, y, cfg, moment)
    with clock.phase("backward"):
        optimizer.backward(result.loss)
    with clock.phase("norm_clip"):
        state.fired(result.firings.to(state.density.dtype), float(len(x)), cfg)
        squares = gradients.squares(optimizer.names, state.divides(layout))
        figures = figures_of(result, layout, squares=squares, n_dead=0, asked=False)
        optimizer.clip(cfg.optimizer.clip_norm, figures.grad_norm)
    with clock.phase("update"):
        optimizer.step(cfg.lr, norm=figures.grad_norm, number=state.step)
    state.step += 1
    return result


@contextmanager
def encoders_timed(clock: Clock) -> Iterator[list[Entries]]:
    """Inside, encoding is a phase of its own; gives the places worked on by source, none where it was all of them."""
    encode: Callable = objective.encode
    places: list[Entries] = []

    def timed(*arguments):
        with clock.phase("encode"):
            encodings = encode(*arguments)
        places.extend(encoding.pre.entries for encoding in encodings if isinstance(encoding.pre, Sparse))
        return encodings

    objective.encode = timed
    try:
        yield places
    finally:
        objective.encode = encode


@dataclass(frozen=True)
class Last:
    """What the last step of a way was like."""

    l0: float
    places: int
    """Zero if it worked on all of them."""
    work: dict[str, float]
    peak: int | None


def least_work(case: Case, places: Sequence[Entries]) -> dict[str, float]:
    """Operations and bytes of a step of the way that worked on these places by source, or, without any, on all."""
    sizes, moment_bytes = case.sizes, 2 if case.options.moments == "bf16" else 4
    touched = 1.0
    if case.options.lazy and places:
        rows = sum(len(entries.feature.unique()) for entries in places)
        touched = rows / sizes.n_features / sizes.n_layers
    moved = {"update_bytes": step_floor.update_bytes(sizes, case.weight_bytes, moment_bytes, touched)}
    if not places:
        return {"dense_flop": step_floor.dense_flop(sizes)} | moved
    entries = [len(each) for each in places]
    finding, rest = step_floor.sparse_flop(sizes, entries)
    tables = step_floor.table_bytes(sizes, entries, case.weight_bytes)
    return {"dense_flop": finding, "sparse_flop": rest, "table_bytes": tables} | moved


def measured(case: Case) -> dict[str, dict]:
    """Both ways in turn, in this process, on the same parameters."""
    cfgs = {way: configured(case, way) for way in case.options.way}
    require_memory(case, cfgs)
    state, x, y = started(case, next(iter(cfgs.values())))
    clock, yardstick = Clock(case.device), Yardstick(case.sizes, case.device, case.products)
    rounds, last = defaultdict(list), {}
    for number in range(WARM_UP + case.options.rounds):
        phases = {}
        for way, cfg in cfgs.items():
            if case.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with encoders_timed(clock) as places:
                result = step(cfg, state, x, y, clock)
            phases[way], peak = clock.seconds(), peak_memory(case)
            last[way] = Last(result.l0.mean().item(), sum(map(len, places)), least_work(case, places), peak)
            del result, places
        yardstick.measure(clock)
        seconds = clock.seconds()
        if number >= WARM_UP:
            for way, each in phases.items():
                least = step_floor.floor(case.sizes, case.device, last[way].work, seconds)
                rounds[way].append(Round(each, seconds, least))
    return {way: figures(case, rounds[way], last[way]) for way in cfgs} | {"speedup": speedup(rounds)}


def figures(case: Case, rounds: list[Round], last: Last) -> dict:
    """Medians over rounds."""
    phases = {name: median(each.phases[name] for each in rounds) for name in rounds[0].phases}
    phases["decode_loss"] = phases.pop("forward") - phases["encode"]
    seconds = median(each.seconds for each in rounds)
    sizes = case.sizes
    rates = [step_floor.rates(sizes, case.device, each.yardstick) for each in rounds]
    per_token = last.places / sizes.batch_tokens / sizes.n_layers
    return {
        "l0": round(last.l0, 2),
        "places_per_token": round(per_token, 2) if last.places else sizes.n_features,
        "tokens_per_second": round(sizes.batch_tokens / seconds, 1),
        "seconds": {name: round(value, 5) for name, value in phases.items()},
        "peak_memory_bytes": last.peak,
        **{name: round(value) for name, value in last.work.items()},
        "floor_seconds": round(median(each.floor for each in rounds), 5),
        "over_floor": round(median(each.seconds / each.floor for each in rounds), 3),
        "over_dense_products": round(median(each.seconds / each.yardstick["products"] for each in rounds), 3),
        "gflop_per_second": round(median(flop for flop, _ in rates) / 1e9, 1),
        "gbyte_per_second": round(median(byte for _, byte in rates) / 1e9, 2),
        "rounds": len(rounds),
    }


def speedup(rounds: dict[str, list[Round]]) -> list[float] | None:
    """Median and quartiles of dense by sparse."""
    if set(rounds) != set(WAYS):
        return None
    ratios = [dense.seconds / sparse.seconds for dense, sparse in zip(rounds["dense"], rounds["sparse"], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return [round(value, 3) for value in (middle, low, high)]


def require_memory(case: Case, cfgs: dict[str, TrainConfig]) -> None:
    """Refuse what does not fit, before anything is made; by the arithmetic of `circuitmill plan`."""
    sizes = case.sizes
    shape, one = census.Shape(sizes.n_layers, sizes.d_model), census.Division("single")
    peaks = [
        memory(cfg, shape, census.count(cfg, shape), one, device=case.device.type, dead=0.0).peak
        for cfg in cfgs.values()
    ]
    beside = Yardstick.size(sizes, case.device, case.products)
    there = memory_of(case.device)
    if max(peaks) + beside > there:
        raise SystemExit(
            f"expected at most {there / 1e9:.1f} GB, what {case.device} has, found {max(peaks) / 1e9:.1f} GB for a "
            f"training of shape {case.shape} and {beside / 1e9:.1f} GB for what it is compared with; take a smaller "
            "--shape, --way sparse alone, or fewer bits (--precision bf16 --moments bf16)"
        )


def peak_memory(case: Case) -> int | None:
    """Of tensors on a GPU in the last step, less the yardstick's; on a CPU a process of its own has to say."""
    if case.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated() - Yardstick.size(case.sizes, case.device, case.products)


def peak_alone(case: Case, way: str) -> int:
    """Most memory of a process that makes two steps, libraries included."""
    own = case.options
    values = {"shape": case.shape, "kind": case.kind, "l0": case.l0, "way": way, "threads": own.threads}
    values |= {"precision": own.precision, "moments": own.moments, "near": own.near}
    command = [sys.executable, "-m", "benchmarks.train_step", "--peak", *(["--lazy"] if own.lazy else [])]
    command += [f"--{name}={value}" for name, value in values.items()]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY).stdout)


def print_peak(case: Case) -> None:
    """What `peak_alone` reads."""
    (way,) = case.options.way
    cfg = configured(case, way)
    state, x, y = started(case, cfg)
    for _ in range(2):
        step(cfg, state, x, y, Clock(case.device))
    # not of getrusage, which begins with what the process that started this one had
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM:")]
    print(int(line.split()[1]) * 1024)


def compare(case: Case) -> None:
    """A line per way, and one for both."""
    found = measured(case)
    ratio = found.pop("speedup")
    for way, row in found.items():
        if row["peak_memory_bytes"] is None:
            row["peak_memory_bytes"] = peak_alone(case, way)
        print(json.dumps(case.named | {"way": way} | row), flush=True)
    if ratio is None:
        return
    line = case.named | {"speedup": ratio, "load": [round(load, 1) for load in os.getloadavg()]}
    own = case.options
    barred = (case.shape, case.l0, own.device, own.threads) == ("M", 16, "cpu", 1)
    if barred and (own.precision, own.moments, own.lazy) == ("float32", "float32", False):
        least, most = BARS[case.kind]
        line["passes"] = ratio[0] >= least and found["sparse"]["over_dense_products"] <= most
    print(json.dumps(line), flush=True)


def crossover(shape: str, options: argparse.Namespace) -> None:
    """A line per share of places, and one with the share at which both ways are equally fast."""
    found = []
    for kept in SHARES:
        case = Case(shape, "jumprelu", kept * SHAPES[shape].n_features / (1 + options.near), options)
        result = measured(case)
        speeds = {way: result[way]["tokens_per_second"] for way in WAYS}
        found.append((kept, result["speedup"][0]))
        print(json.dumps({"kept": kept} | case.named | speeds | {"speedup": result["speedup"]}), flush=True)
    crossings = [
        math.exp(math.log(a) + (math.log(b) - math.log(a)) * math.log(high) / math.log(high / low))
        for (a, high), (b, low) in pairwise(found)
        if high >= 1 > low
    ]
    print(json.dumps({"shape": shape, "device": options.device, "equal_at": [round(each, 4) for each in crossings]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=["M"])
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--l0", type=float, nargs="*", default=[16.0], help="features per token and layer")
    parser.add_argument("--way", choices=WAYS, nargs="*", default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bf16_autocast", "bf16"), default="float32")
    parser.add_argument("--moments", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--lazy", action="store_true", help="leave features without a gradient alone")
    parser.add_argument("--near", type=float, default=0.75, help="places below the threshold for each that fires")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--peak", action="store_true", help="print the memory of one case, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shape:
        if options.crossover:
            crossover(shape, options)
            continue
        for kind in options.kind:
            for l0 in options.l0:
                case = Case(shape, kind, l0, options)
                (print_peak if options.peak else compare)(case)


if __name__ == "__main__":
    main()
