"""The optimizer: a thin wrapper that sets the rate and saves the state as named tensors."""

import torch
from torch import Tensor, nn

from circuitmill.config.train import TrainConfig
from circuitmill.core.transcoder import Transcoder


class Optimizer:
    """A torch optimizer over a transcoder's trained parameters."""

    def __init__(self, transcoder: Transcoder, inner: torch.optim.Optimizer) -> None:
        self._names: dict[nn.Parameter, str] = {p: name for name, p in transcoder.named_parameters() if p.requires_grad}
        self.inner = inner

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the transcoder."""
        return list(self._names)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.inner.param_groups[0]["lr"]

    def step(self, lr: float) -> None:
        """One update at this rate; gradients are cleared."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors on the CPU: `optimizer/<key>/<parameter>`."""
        return {
            f"optimizer/{key}/{name}": value.detach().cpu()
            for parameter, name in self._names.items()
            for key, value in self.inner.state.get(parameter, {}).items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        order = [self._names[p] for group in self.inner.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, own, name = key.split("/")
                state.setdefault(order.index(name), {})[own] = value
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})


def make_optimizer(transcoder: Transcoder, cfg: TrainConfig) -> Optimizer:
    """Adam over all trained parameters, in one fused pass; both moments are float32."""
    own = cfg.optimizer
    trained = [p for p in transcoder.parameters() if p.requires_grad]
    inner = torch.optim.Adam(trained, lr=cfg.lr, betas=(own.beta1, own.beta2), eps=own.eps, fused=True)
    return Optimizer(transcoder, inner)
