"""Parameters, gradients and optimizer divided by rows between steps, whole while a batch is worked on.

torch's fully_shard (Zhao et al. 2023, "PyTorch FSDP", in its second form) acts on calls of a module; here the call is
the evaluation of a batch, whatever of the transcoder that uses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from circuitmill.core.transcoder import Transcoder
from circuitmill.training.parallel.layout import Layout

Loss = Callable[[], tuple[Tensor, Any]]
"""Evaluates a batch: the loss, to be differentiated, and by-products without gradients."""


class Divided(nn.Module):
    """Evaluates batches with a transcoder of which this rank keeps some rows.

    Args:
        transcoder: Whole, and the same on all ranks; is changed in place.
        layout: Of the training.
    """

    def __init__(self, transcoder: Transcoder, layout: Layout) -> None:
        super().__init__()
        self.transcoder = transcoder
        axes = axes_of(transcoder, layout.data.size)
        mesh: Any = layout.mesh
        fully_shard(self, mesh=mesh["data"], shard_placement_fn=lambda parameter: Shard(axes[parameter]))

    def forward(self, loss: Loss) -> tuple[Tensor, Any]:
        """The loss and its by-products."""
        return loss()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, parameters are whole on every rank; all ranks must come here."""
        # fully_shard has made this module an FSDPModule
        module: Any = self
        module.unshard()
        try:
            yield
        finally:
            module.reshard()


def axes_of(transcoder: Transcoder, n_ranks: int) -> dict[nn.Parameter, int]:
    """Axis along which each parameter is divided: the longest that can be divided equally, or the first one."""
    found = {}
    for parameter in transcoder.parameters():
        equal = [axis for axis, size in enumerate(parameter.shape) if size % n_ranks == 0]
        found[parameter] = max(equal, key=lambda axis: parameter.shape[axis]) if equal else 0
    return found
