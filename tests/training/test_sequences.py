"""Whole sequences as batches, and training through a language model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.helpers import run, tiny

from circuitmill.config.model import ModelConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig
from circuitmill.core.scaling import Scaling
from circuitmill.errors import ConfigError
from circuitmill.lm.end_to_end import EndToEnd
from circuitmill.lm.load import load_language_model
from circuitmill.training.objective import Moment, evaluate_batch
from circuitmill.training.parallel.collectives import Group
from circuitmill.training.sequences import SequenceBatch, SequenceBatches, parts_of
from circuitmill.training.state import start

BOS, CONTEXT, N_SEQUENCES, D_MODEL = 1, 8, 21, 16
CFG = tiny(
    n_features=24,
    batch_tokens=4 * CONTEXT,
    nonlinearity=NonlinearityConfig("jumprelu", bandwidth=0.3),
    loss__kl=TermConfig(0.7),
    loss__cross_entropy=TermConfig(0.2),
)


@pytest.fixture
def sequences():
    """BOS at the start, and in some sequences again: parts of as many sequences do not count as many tokens."""
    found = np.random.default_rng(0).integers(2, 250, (N_SEQUENCES, CONTEXT)).astype(np.int32)
    found[:, 0] = BOS
    found[::2, 4] = BOS
    found[::3, 3:] = BOS
    return found


@pytest.fixture
def model(tiny_model_dir: Path):
    cfg = ModelConfig(source="folder", name=str(tiny_model_dir), revision="", dtype="float32")
    lm = load_language_model(cfg, toyworld=None, device=torch.device("cpu"))
    return EndToEnd(lm, Scaling.by_layer(torch.tensor([1.1, 0.8]), torch.tensor([9.0, 7.0]), D_MODEL))


def rank(number, size):
    return Group(number, size)


def moment_of(state, tokens=10_000):
    return Moment(tokens, state.dead(CFG.dead_tokens), state.density)


def test_an_epoch_visits_every_sequence_once_in_an_order_of_its_own(sequences, model):
    batches = SequenceBatches(sequences, model, CFG, Group())
    assert batches.n_batches_per_epoch == 5
    epochs = [torch.cat([batches.get(5 * epoch + index).tokens for index in range(5)]) for epoch in range(2)]
    for seen in epochs:
        rows = {tuple(row) for row in seen.tolist()}
        assert len(rows) == 20 and rows <= {tuple(row) for row in sequences.tolist()}
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0][:4], torch.from_numpy(sequences[:4].astype(np.int64)))


def test_a_batch_is_a_function_of_seed_and_index(sequences, model):
    batches = SequenceBatches(sequences, model, CFG, Group())
    found = [batches.get(index).tokens for index in (7, 2, 7)]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    with SequenceBatches(sequences, model, CFG, Group()) as again:
        assert torch.equal(again.get(7).tokens, found[0])
    other = SequenceBatches(sequences, model, dataclasses.replace(CFG, seed=1), Group())
    assert not torch.equal(other.get(7).tokens, found[0])


def test_ranks_share_a_batch_and_begin_alike(sequences, model):
    whole = SequenceBatches(sequences, model, CFG, Group())
    ranks = [SequenceBatches(sequences, model, CFG, rank(number, 2)) for number in range(2)]
    for index in (0, 6):
        assert torch.equal(torch.cat([part.get(index).tokens for part in ranks]), whole.get(index).tokens)
    first = whole.get(0)
    assert len(first.x) == int((first.tokens != BOS).sum()) < first.tokens.numel()
    for part in (whole, *ranks):
        x, y = part.beginning()
        torch.testing.assert_close(x, first.x)
        torch.testing.assert_close(y, first.y)


def losses_and_gradients(state, batch, parts):
    """The mean over parts of terms, loss and gradients, as the loop forms them."""
    parameters = state.optimizer.parameters
    found = []
    for x, y, whole in parts_of(batch, parts):
        result = evaluate_batch(state.transcoder, x, y, CFG, moment_of(state), whole)
        found.append([*result.terms.values(), result.loss, *torch.autograd.grad(result.loss, parameters)])
    return [torch.stack(values).mean(dim=0) for values in zip(*found, strict=True)]


@pytest.mark.parametrize(("n_ranks", "parts"), [(1, 1), (1, 4), (2, 1), (4, 1), (2, 2)])
def test_parts_and_ranks_give_the_numbers_of_the_whole_batch(sequences, model, n_ranks, parts):
    state = start(CFG, *SequenceBatches(sequences, model, CFG, Group()).beginning())
    batch = SequenceBatches(sequences, model, CFG, Group()).get(1)
    counts = (batch.tokens != BOS).sum(dim=1)
    assert len(set(counts.tolist())) > 1, "a plain mean over parts must be wrong"
    expected = losses_and_gradients(state, batch, 1)
    found = [
        losses_and_gradients(state, SequenceBatches(sequences, model, CFG, rank(number, n_ranks)).get(1), parts)
        for number in range(n_ranks)
    ]
    for value, *others in zip(expected, *found, strict=True):
        torch.testing.assert_close(sum(others) / n_ranks, value, rtol=1e-4, atol=1e-6)


def test_unweighted_parts_would_not(sequences, model):
    """What the shares are for: without them a term is off by more than the tolerance above."""
    batch = SequenceBatches(sequences, model, CFG, Group()).get(1)
    state = start(CFG, batch.x, batch.y)
    plain = []
    for x, y, whole in parts_of(batch, 4):
        result = evaluate_batch(state.transcoder, x, y, CFG, moment_of(state), whole)
        plain.append(result.terms["reconstruction"] / whole.share)
    right = evaluate_batch(state.transcoder, batch.x, batch.y, CFG, moment_of(state), batch).terms["reconstruction"]
    assert abs(sum(plain) / 4 / right - 1) > 1e-3


def test_parts_of_shuffled_tokens():
    x, y = torch.arange(12.0).view(6, 1, 2), torch.ones(6, 1, 2)
    parts = list(parts_of((x, y), 3))
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert [len(part[1]) for part in parts] == [2, 2, 2] and all(part[2] is None for part in parts)
    with pytest.raises(ConfigError, match=r"a divisor of the 6 tokens.*found 4\n.*train.optimizer.micro_batches"):
        list(parts_of((x, y), 4))


@pytest.mark.parametrize(
    ("batch_tokens", "size", "message"),
    [
        (3 * CONTEXT + 4, 1, r"a multiple of 8 \(whole sequences of 8 tokens for each of 1 ranks\); found 28"),
        (3 * CONTEXT, 2, r"a multiple of 16 .* 2 ranks\); found 24"),
        (22 * CONTEXT, 1, r"a batch of at most 168 tokens.*; found 176"),
    ],
)
def test_batches_of_sequences_that_do_not_come_out_even(sequences, model, batch_tokens, size, message):
    cfg = dataclasses.replace(CFG, batch_tokens=batch_tokens, pool_tokens=batch_tokens)
    with pytest.raises(ConfigError, match=message + r"\n  where: train.batch_tokens"):
        SequenceBatches(sequences, model, cfg, rank(0, size))
    with pytest.raises(ConfigError, match=r"a divisor of the 4 sequences.*found 3\n.*train.optimizer.micro_batches"):
        list(SequenceBatches(sequences, model, CFG, Group()).get(0).parts(3))


def trained(state, batches, cfg, steps):
    """KL before each step."""
    found, adam = [], torch.optim.Adam(state.optimizer.parameters, lr=cfg.lr)
    for step in range(steps):
        for x, y, whole in parts_of(batches.get(step), 1):
            result = evaluate_batch(state.transcoder, x, y, cfg, moment_of(state), whole)
            result.loss.backward()
        adam.step()
        adam.zero_grad()
        found.append(result.terms["kl"].item())
    return found


@pytest.mark.parametrize("balance", [None, True])
def test_thirty_steps_lower_the_kl(sequences, model, balance):
    cfg = dataclasses.replace(CFG, loss={"reconstruction": TermConfig(1.0), "kl": TermConfig(1.0, balance=balance)})
    cfg = dataclasses.replace(cfg, batch_tokens=16 * CONTEXT, pool_tokens=16 * CONTEXT)
    batches = SequenceBatches(sequences, model, cfg, Group())
    state = start(cfg, *batches.beginning())
    assert isinstance(batches.get(0), SequenceBatch)
    found = trained(state, batches, cfg, 30)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])


def test_the_loop_trains_on_sequences_in_whole_or_in_parts(sequences, model):
    cfg = dataclasses.replace(CFG, batch_tokens=16 * CONTEXT, pool_tokens=16 * CONTEXT, tokens=30 * 16 * CONTEXT)
    ends = []
    for parts in (1, 4):
        own = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, micro_batches=parts))
        batches = SequenceBatches(sequences, model, own, Group())
        ends.append(run(own, start(own, *batches.beginning()), data=batches))
    (whole, rows), (split, others) = ends
    assert rows[-1]["loss_kl"] < 0.6 * rows[0]["loss_kl"]
    assert others[-1]["loss_kl"] == pytest.approx(rows[-1]["loss_kl"], rel=1e-3)
    assert others[-1]["ev"] == pytest.approx(rows[-1]["ev"], rel=1e-3)
    for one, other in zip(whole.transcoder.parameters(), split.transcoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
