"""Train a few steps as one rank of a group, or as a process that never heard of a group, and write what came out.

python -m tests.distributed.gradients OUT.safetensors          (torchrun's variables decide about the group)
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.training.helpers import batches, fresh, run, tiny

from circuitmill import distributed
from circuitmill.config.train import TermConfig
from circuitmill.stores.tensors import write_tensors
from circuitmill.training import parallel
from circuitmill.training.objective import Moment, evaluate_batch

CFG = tiny(tokens=192, monitor__log_tokens=32, loss__auxiliary=TermConfig(1.0, k=4))
BF16 = tiny(
    tokens=640,
    optimizer__name="muon",
    optimizer__precision="bf16",
    optimizer__micro_batches=2,
    loss__tanh_sparsity=TermConfig(30.0, scale=1.0),
    checkpoint_l0=(3.9,),
    stop_l0=3.9,
)
"""Parameters of two types, random rounding, and decisions by the running L0."""


def main(out: Path) -> None:
    """Gradients of the first batch with some features dead, then metrics and parameters after a short training."""
    ranks = distributed.init()
    assert dist.is_initialized() == (ranks.size > 1)
    state = fresh(CFG)
    dead = torch.zeros_like(state.idle, dtype=torch.bool)
    dead[:, ::3] = True
    with batches(CFG, ranks) as data:
        pair = data.get(0)
        result = evaluate_batch(state.transcoder, *pair, CFG, Moment(CFG.tokens, dead, state.density))
    result.loss.backward()
    parallel.average_gradients(state.transcoder.parameters(), ranks)
    norm = torch.nn.utils.clip_grad_norm_(list(state.transcoder.parameters()), 1e9)
    found = {f"gradient.{name}": parameter.grad for name, parameter in state.transcoder.named_parameters()}
    found["norm"] = norm
    for name, side in zip(("inputs", "outputs"), pair, strict=True):
        found[f"own.{name}"], found[f"gathered.{name}"] = side, parallel.gather_rows(side, ranks).clone()
    trained, rows = run(CFG, ranks=ranks, data=batches(CFG, ranks))
    found["idle"] = trained.idle
    found |= {f"trained.{name}": value.detach() for name, value in trained.transcoder.named_parameters()}
    for key in ("loss", "loss_reconstruction", "loss_tanh_sparsity", "ev", "ev_per_layer", "l0", "dead", "grad_norm"):
        found[f"row.{key}"] = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    rounded, _ = run(BF16, ranks=ranks, data=batches(BF16, ranks), checkpoint=lambda state, l0=None: None)
    found["rounded.steps"], found["rounded.decay_from"] = torch.tensor(rounded.step), torch.tensor(rounded.decay_from)
    found["rounded.reached"] = torch.tensor(sorted(rounded.reached))
    found |= {f"rounded.{name}": value for name, value in rounded.optimizer.tensors().items()}
    write_tensors(out.with_name(f"{out.name}-{ranks.rank}.safetensors"), found)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
