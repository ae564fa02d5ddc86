"""On the same activations, with the same hyperparameters and after as many tokens our loss is at most a peer's."""

import pytest
import torch
from tests.training.clt_forge_recipe import Recipe
from tests.training.helpers import run, tiny

from circuitmill.config.optimizer import OptimizerConfig
from circuitmill.config.train import InitConfig, NonlinearityConfig, TermConfig
from circuitmill.core.codecs import StoredBatch, plain_batch
from circuitmill.core.scaling import Scaling
from circuitmill.training.batches import Batches
from circuitmill.training.objective import Moment, evaluate_batch

N_LAYERS, D_MODEL, N_FEATURES, BATCH, STEPS = 3, 12, 48, 256, 1500
LR, SPARSITY, DEAD = 2e-3, 0.3, 1e-5


class Planted:
    """Outputs are sums of planted features that read the inputs of one layer and write to it and all later ones."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.read = torch.nn.functional.normalize(torch.randn(N_LAYERS, 32, D_MODEL, generator=generator), dim=2)
        self.write = torch.randn(N_LAYERS, N_LAYERS, 32, D_MODEL, generator=generator) * 0.5

    def pair(self, index):
        generator = torch.Generator().manual_seed(1000 + index)
        fires = torch.rand(BATCH, N_LAYERS, 32, generator=generator) < 0.08
        size = fires * (0.5 + torch.rand(fires.shape, generator=generator))
        x = torch.einsum("nlf,lfd->nld", size, self.read)
        y = torch.stack([sum(size[:, s] @ self.write[s, t] for s in range(t + 1)) for t in range(N_LAYERS)], dim=1)
        x, y = (side * (D_MODEL / side.square().sum(dim=2).mean(dim=0))[:, None].sqrt() for side in (x, y))
        return x, y

    def batch(self, index) -> StoredBatch:
        return plain_batch(*self.pair(index))


@pytest.mark.slow
def test_our_loss_is_at_most_the_recipes():
    data = Planted()
    theirs = Recipe(
        N_LAYERS,
        N_FEATURES,
        D_MODEL,
        steps=STEPS,
        lr=LR,
        sparsity=SPARSITY,
        dead_penalty=DEAD,
        betas=(0.9, 0.999),
        seed=0,
    )
    for step in range(STEPS):
        theirs.step(*data.pair(step), step)
    cfg = tiny(
        n_features=N_FEATURES,
        tokens=STEPS * BATCH,
        batch_tokens=BATCH,
        pool_tokens=BATCH,
        nonlinearity=NonlinearityConfig("jumprelu", bandwidth=1.0),
        init=InitConfig(threshold=0.03, encoder_bias="firing_rate", l0=8.0, decoder_bias="mean"),
        loss={
            "reconstruction": TermConfig(1.0),
            "tanh_sparsity": TermConfig(SPARSITY, ramp_share=0.7, scale=4.0),
            "pre_activation": TermConfig(DEAD),
        },
        lr=LR,
        warmup_tokens=20 * BATCH,
        decay_share=0.3,
        optimizer=OptimizerConfig(beta2=0.999),
        dead_tokens=100 * BATCH,
        monitor__log_tokens=STEPS * BATCH,
        checkpoint_tokens=STEPS * BATCH,
    )
    ones = torch.ones(N_LAYERS)
    state, _ = run(cfg, data=Batches(data, Scaling.by_layer(ones, ones, D_MODEL), device=torch.device("cpu")))
    end = Moment(cfg.tokens, state.dead(cfg.dead_tokens), state.density)
    held_out = [data.pair(10**6 + index) for index in range(8)]
    found = {
        "ours": sum(evaluate_batch(state.transcoder, x, y, cfg, end).loss.item() for x, y in held_out) / 8,
        "theirs": sum(theirs.loss(x, y, STEPS).item() for x, y in held_out) / 8,
    }
    assert found["ours"] <= found["theirs"], found
