"""Pretraining of the embedded model: Muon on the blocks' matrices, AdamW on the rest, budgets in tokens.

1. The training text is one stream of tokens, BOS in front of each document.
2. Update i sees windows of the model's context that begin at document starts drawn by a generator seeded with
   (seed, i). An update therefore needs nothing from the one before but weights and optimizer state, and a
   continued run equals an unbroken one bit for bit.
3. Rates rise over `warmup_tokens`, stay, and fall linearly from `decay_from` of the budget. The algorithmic
   tasks (induction, addition) appear late and suddenly; AdamW alone did not reach them within the budget.
4. How late depends on rounding, and so on processor and threads. A model that lacks a task can be given extensions:
   they go on from its weights and with the batches that come next, with optimizers and a schedule of their own.
"""

import json
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from circuitmill.config.toyworld import PretrainConfig
from circuitmill.core.muon import Muon
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.logs import progress
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import StageOutput
from circuitmill.toyworld.transformer import is_key_or_query

_LOG_TOKENS = 51_200
"""Tokens between two lines of metrics."""
EARLY = 0.25
"""Share of the budget after which the early model is kept: it has learned facts of one hop and hardly those of two."""
_NOTHING = -100
"""The target of a position that predicts nothing."""
_MOMENTUM = 0.95
_BETAS = (0.9, 0.98)

_log = logging.getLogger(__name__)


class Windows:
    """Training batches by number.

    Args:
        stream: All training documents, BOS in front of each.
    """

    def __init__(self, stream: Int[np.ndarray, " token"], *, bos_id: int, context: int, seed: int) -> None:
        starts = np.flatnonzero(stream == bos_id)
        self._starts = starts[starts + context <= len(stream)]
        if not len(self._starts):
            raise ConfigError(
                f"text of at least one context ({context} tokens)",
                found=f"{len(stream)} tokens",
                where="toyworld.corpus.documents",
                fix="generate more documents",
            )
        self._stream, self._offsets, self._seed = stream, np.arange(context), seed

    def batch(self, number: int, n_sequences: int) -> Int[Tensor, "sequence pos"]:
        """The windows of one update; a function of the seed and the number."""
        rng = np.random.default_rng([self._seed, number])
        starts = rng.choice(self._starts, n_sequences)
        return torch.from_numpy(self._stream[starts[:, None] + self._offsets].astype(np.int64))


class Pretraining:
    """Model, optimizers and schedule of one run.

    Args:
        model: Random weights; an extension replaces them by those that the run before it ended with.
        key_query_scale: What the learning rate of keys and queries is multiplied by.
        extension: 0 is the budget of `cfg.tokens`, the numbers from 1 are the extensions after it.
    """

    def __init__(
        self, model: PreTrainedModel, cfg: PretrainConfig, *, key_query_scale: float, extension: int = 0
    ) -> None:
        self.model, self.cfg, self.extension = model, cfg, extension
        self.n_updates = updates_after(cfg, extension)
        """Updates that will have been made at the end of this run, those of the runs before it included."""
        self.first = updates_after(cfg, extension - 1) if extension else 0
        """Updates that the runs before it made."""
        self.done = self.first
        """Updates made, likewise."""
        embedding = model.get_input_embeddings().weight  # tied: also the unembedding
        mlp, attention, key_query, rest = [], [], [], []
        for name, weight in model.named_parameters():
            if weight.ndim != 2 or weight is embedding or ".wpe." in name:
                rest.append(weight)
            elif is_key_or_query(name):
                key_query.append(weight)
            else:
                (mlp if ".mlp." in name else attention).append(weight)
        groups = [
            {"params": mlp, "lr": cfg.lr_mlp},
            {"params": attention, "lr": cfg.lr_attention},
            {"params": key_query, "lr": cfg.lr_attention * key_query_scale},
        ]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(groups, lr=cfg.lr_mlp, weight_decay=cfg.weight_decay, momentum=_MOMENTUM),
            "adamw": torch.optim.AdamW(rest, lr=cfg.lr_rest, betas=_BETAS, weight_decay=0.0, fused=True),
        }
        for group in self._groups():
            group["peak"] = group["lr"]

    def _groups(self) -> list[dict]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def rate(self, tokens: int) -> float:
        """Share of the peak learning rates after `tokens` tokens, those of the runs before included."""
        cfg = self.cfg
        tokens -= self.first * cfg.batch_tokens
        rise = min(1.0, (tokens + cfg.batch_tokens) / cfg.warmup_tokens) if cfg.warmup_tokens else 1.0
        if self.extension:
            left = 1 - tokens / cfg.extension_tokens
            return rise * (cfg.final_lr + (cfg.extension_rate - cfg.final_lr) * left)
        share = tokens / cfg.tokens
        if share < cfg.decay_from:
            return rise
        return rise * max(cfg.final_lr, 1 - (share - cfg.decay_from) / (1 - cfg.decay_from))

    def update(self, tokens: Int[Tensor, "sequence pos"]) -> float:
        """Make one update and return the loss before it, in nats per token.

        Raises:
            DivergedError: the loss is not finite; the weights are left as they were.
        """
        rate = self.rate(self.done * self.cfg.batch_tokens)
        for group in self._groups():
            group["lr"] = group["peak"] * rate
        loss = next_token_loss(self.model(tokens, use_cache=False).logits, tokens)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                "a finite loss",
                found=value,
                where=f"toyworld pretraining, update {self.done + 1} of {self.n_updates}",
                fix="lower toyworld.pretrain.lr_attention, lr_mlp and lr_rest",
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return value

    def state(self) -> dict[str, Tensor]:
        """Everything the next update depends on: weights and optimizer state, by name."""
        tensors = {f"model/{name}": weight.detach() for name, weight in self.model.named_parameters()}
        for kind, optimizer in self._optimizers.items():
            for index, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}/{index}/{key}": value for key, value in entry.items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a state, not what its optimizers knew."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model/{name}"])

    def load_state(self, tensors: dict[str, Tensor], done: int) -> None:
        """Go on from a state."""
        self.done = done
        self.load_weights(tensors)
        for kind, optimizer in self._optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"{kind}/"):
                    _, index, key = name.split("/")
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def updates_after(cfg: PretrainConfig, extensions: int) -> int:
    """Updates of the budget and a number of extensions together."""
    return cfg.tokens // cfg.batch_tokens + extensions * (cfg.extension_tokens // cfg.batch_tokens)


def next_token_loss(
    logits: Float[Tensor, "sequence pos d_vocab"], tokens: Int[Tensor, "sequence pos"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token given those before it in its window."""
    # The last position predicts nothing. Ignoring it is faster than cutting it off, which copies all logits.
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=_NOTHING)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_NOTHING)


def pretrain(
    run: Pretraining,
    windows: Windows,
    output: StageOutput,
    *,
    early: Callable[[PreTrainedModel], None] | None = None,
    interrupt: Callable[[], bool] = bool,
) -> None:
    """Train to the end of the run, continuing from the last checkpoint in `output`.

    A checkpoint of the run before gives an extension its weights: the last one has to be kept until then.
    Writes `metrics.jsonl` (tokens, loss, share of the peak learning rate; an extension adds lines) and, every
    `checkpoint_tokens`, a checkpoint that replaces the one before.

    Args:
        early: Given the model after `EARLY` of the first budget. Any later checkpoint was made after that.
        interrupt: Asked after each update; True stops there, as a kill would.

    Raises:
        DivergedError: the loss is not finite.
    """
    cfg = run.cfg
    metrics = _resume(run, output)
    run.model.train()
    n_sequences, every = (
        cfg.batch_tokens // run.model.config.max_position_embeddings,
        _updates(cfg.checkpoint_tokens, cfg),
    )
    total, before = ((updates - run.first) * cfg.batch_tokens for updates in (run.n_updates, run.done))
    what = f"extension {run.extension} of pretraining" if run.extension else "pretraining the embedded model"
    losses: list[float] = []
    with progress(what, total=total, unit="tokens", done=before) as bar:
        while run.done < run.n_updates:
            rate = run.rate(run.done * cfg.batch_tokens)
            losses.append(run.update(windows.batch(run.done, n_sequences)))
            bar.advance(cfg.batch_tokens)
            if early is not None and run.done == max(1, int(EARLY * updates_after(cfg, 0))):
                early(run.model)
            last = run.done == run.n_updates
            checkpoint = last or run.done % every == 0
            if checkpoint or run.done % _updates(_LOG_TOKENS, cfg) == 0:
                mean = sum(losses) / len(losses)
                bar.note(f"loss {mean:.3f}")
                metrics.append({"tokens": run.done * cfg.batch_tokens, "loss": mean, "rate": rate})
                losses.clear()
            if checkpoint:
                _checkpoint(run, metrics, output)
            if interrupt():
                return
    run.model.eval()


def _updates(tokens: int, cfg: PretrainConfig) -> int:
    return max(1, tokens // cfg.batch_tokens)


def _resume(run: Pretraining, output: StageOutput) -> list[dict]:
    entry = output.ledger.get("checkpoint")
    if entry is not None:
        tensors = load(output.path(entry["file"]).read_bytes())
        if entry["updates"] > run.first:
            run.load_state(tensors, entry["updates"])
            _log.info("pretraining continues after %d of %d updates", run.done, run.n_updates)
        else:
            run.load_weights(tensors)
    path = output.path("metrics.jsonl")
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line for line in lines if line["tokens"] <= run.done * run.cfg.batch_tokens]


def _checkpoint(run: Pretraining, metrics: list[dict], output: StageOutput) -> None:
    previous = output.ledger.get("checkpoint")
    name = f"checkpoints/{run.done:08d}.safetensors"
    atomic_write(output.path(name), save(run.state()))
    atomic_write(output.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in metrics))
    output.ledger.put("checkpoint", file=name, updates=run.done)
    if previous is not None and previous["file"] != name:
        output.path(previous["file"]).unlink(missing_ok=True)
