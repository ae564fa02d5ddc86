"""How long one update takes, against a plain copy of as many bytes in the same run.

    python -m benchmarks.optimizer_step [--rows 8192] [--targets 4] [--width 768] [--device cpu] [--threads 1]

One JSON line per way of updating a matrix [feature target d_model]: milliseconds of process time (of wall time on a
GPU), bytes that the update must read and write for each number, bytes that moments take, the rate at which the former
were moved, and that rate's share of the plain copy's, which the first line gives. Lazy updates are measured with
gradients on some of the features, others in each step; their bytes are those of the features that have one, and of the
gradient once for all. adam8bit is measured where torchao is installed.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable

import torch

from circuitmill.core.adam import RowAdam
from circuitmill.core.rounding import round_stochastically

ADAM = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8}
REPEATS, WARM = 6, 2
FLOAT, HALF = 4, 2


def milliseconds(work: Callable[[int], object], device: str) -> float:
    """Mean over repetitions, the first of which are left out."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    for repeat in range(WARM + REPEATS):
        if repeat == WARM:
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
        work(repeat)
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / REPEATS * 1e3


def copying(shape: tuple[int, ...], device: str) -> float:
    source, target = (torch.ones(shape, device=device) for _ in range(2))
    return milliseconds(lambda repeat: target.copy_(source), device)


def gradients(shape: tuple[int, ...], share: float, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Two, so that features that are left alone in one step have something to catch up in the next."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        touched = (torch.rand(shape[0], 1, 1, generator=generator) < share).to(device)
        found.append((torch.randn(shape, generator=generator).to(device) * touched).to(dtype))
    return found


def by_rows(
    shape: tuple[int, ...], device: str, *, weights: torch.dtype, moments: torch.dtype, axis: int | None, share: float
) -> float:
    weight = torch.nn.Parameter(torch.randn(shape, device=device).to(weights))
    optimizer = RowAdam([{"params": [("W", weight)], "axis": axis}], moments=moments, **ADAM)
    given = gradients(shape, share, weights, device)

    def work(repeat: int) -> None:
        weight.grad = given[repeat % 2]
        optimizer.step()

    return milliseconds(work, device)


def whole(shape: tuple[int, ...], device: str, make: Callable[[list], torch.optim.Optimizer]) -> float:
    weight = torch.nn.Parameter(torch.randn(shape, device=device))
    optimizer = make([weight])
    weight.grad = gradients(shape, 1.0, torch.float32, device)[0]
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        return milliseconds(lambda repeat: optimizer.step(), device)


def stand_in(shape: tuple[int, ...], device: str) -> float:
    """Weights in bfloat16 that an optimizer of torch updates as float32, the whole matrix at once."""
    weight = torch.nn.Parameter(torch.randn(shape, device=device).bfloat16())
    other = torch.nn.Parameter(torch.zeros(shape, device=device))
    optimizer, gradient = torch.optim.Adam([other], fused=True, **ADAM), gradients(shape, 1.0, weight.dtype, device)[0]
    generator = torch.Generator(device).manual_seed(0)

    def work(repeat: int) -> None:
        other.data, other.grad = weight.detach().float(), gradient.float()
        optimizer.step()
        weight.data.copy_(round_stochastically(other.data, generator))

    return milliseconds(work, device)


def adam8bit(parameters: list) -> torch.optim.Optimizer:
    from torchao.optim import Adam8bit

    return Adam8bit(parameters, **ADAM)


def ways(shape: tuple[int, ...], device: str) -> dict[str, tuple[Callable[[], float], float, float]]:
    """Name -> what measures it, bytes to read and write for a number, bytes of its moments."""
    types = {"float32": (torch.float32, FLOAT), "bf16": (torch.bfloat16, HALF)}
    found: dict[str, tuple[Callable[[], float], float, float]] = {
        "adam": (lambda: whole(shape, device, lambda p: torch.optim.Adam(p, fused=True, **ADAM)), 7 * FLOAT, 2 * FLOAT),
        "adam, weights bf16, whole matrix": (lambda: stand_in(shape, device), 3 * HALF + 4 * FLOAT, 2 * FLOAT),
    }
    if importlib.util.find_spec("torchao"):
        found["adam8bit"] = (lambda: whole(shape, device, adam8bit), 3 * FLOAT + 4, 2)
    for weights, (weight_type, weight_bytes) in types.items():
        for moments, (moment_type, moment_bytes) in types.items():
            dense = {"weights": weight_type, "moments": moment_type, "axis": None, "share": 1.0}
            found[f"by rows, weights {weights}, moments {moments}"] = (
                lambda dense=dense: by_rows(shape, device, **dense),
                3 * weight_bytes + 4 * moment_bytes,
                2 * moment_bytes,
            )
    for share in (0.05, 0.2, 0.5, 1.0):
        lazy = {"weights": torch.float32, "moments": torch.float32, "axis": 0, "share": share}
        found[f"lazy, {share:.0%} of features"] = (
            lambda lazy=lazy: by_rows(shape, device, **lazy),
            FLOAT + 7 * FLOAT * share,
            2 * FLOAT,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, device = (arguments.rows, arguments.targets, arguments.width), arguments.device
    numbers, ms = arguments.rows * arguments.targets * arguments.width, copying(shape, device)
    floor = 2 * FLOAT * numbers / ms / 1e6
    about = {"shape": shape, "device": device, "threads": arguments.threads}
    print(json.dumps({"way": "copy", "ms": round(ms, 2), "GB/s": round(floor, 2), **about}), flush=True)
    for name, (measure, moved, kept) in ways(shape, device).items():
        ms = measure()
        rate = moved * numbers / ms / 1e6
        figures = {"ms": round(ms, 2), "bytes": round(moved, 1), "moments": kept, "GB/s": round(rate, 2)}
        print(json.dumps({"way": name, **figures, "of copy": round(rate / floor, 3)}), flush=True)


if __name__ == "__main__":
    main()
