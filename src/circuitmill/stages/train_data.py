"""What stage `train` takes in: activations in shuffled batches and held-out ones in order, and the language model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32

from circuitmill import distributed
from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.core.scaling import Scaling
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.lm.cached import sites_of_cache
from circuitmill.lm.end_to_end import EndToEnd
from circuitmill.lm.live import LiveActivations
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.measure import measure_replacement
from circuitmill.lm.stream import ExpectedModel, LiveBlocks
from circuitmill.lm.targets import mlp_targets
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.batches import BatchSource
from circuitmill.stores.manifest import NAME, Manifest
from circuitmill.stores.tokens import TokenStore
from circuitmill.training.batches import Batches, Pair, Targets
from circuitmill.training.parallel.layout import Layout
from circuitmill.training.sequences import SequenceBatches

BEHAVIOUR_SEQUENCES = 16
"""Sequences that the replacement model runs on at a time."""


@dataclass(frozen=True)
class TrainData:
    """Activations of a cache, stored or from the running model, in a training's units and on its device."""

    inputs: dict[str, Manifest]
    scaling: Scaling

    @cached_property
    def cached(self) -> CacheConfig:
        """The configuration of stage cache."""
        return decode(CacheConfig, self.inputs["cache"].config, "cache")

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model; loaded when something first needs it.

        Raises:
            UpstreamError: it is not the one that the cache was made with.
        """
        lm = load_language_model(self.cached.model, toyworld=self._world, device=distributed.device())
        expected = self.inputs["cache"].counts["model_digest"]
        if lm.digest != expected:
            raise UpstreamError(
                f"a cache of model {lm.name} ({lm.digest[:12]})",
                found=f"one of a model with digest {expected[:12]}",
                where=self.inputs["cache"].folder / NAME,
                fix="run stage cache again with this model",
            )
        return lm

    @cached_property
    def targets(self) -> Targets | None:
        """What computes MLP outputs from stored inputs; None if they are stored, or are the inputs.

        Raises:
            UpstreamError: the model's MLPs are not those that the cache was made with.
        """
        if self.cached.targets != "recomputed":
            return None
        targets = mlp_targets(self.cached.model, toyworld=self._world, device=distributed.device())
        if self.cached.mode == "disk":
            expected = self._store.shards("train")[0].attributes["mlp_digest"]
            if targets.digest != expected:
                raise UpstreamError(
                    f"the MLPs that the cache was made with ({expected[:12]})",
                    found=targets.digest[:12],
                    where=f"cache.model.name: {self.cached.model.name}",
                    fix="run stage cache again with this model",
                )
        return targets

    def batches(self, cfg: TrainConfig, layout: Layout, stack: ExitStack) -> Batches | SequenceBatches:
        """Batches of the train split for this rank; whole sequences if the language model takes part in the loss.

        Args:
            stack: Ends threads and processes.

        Raises:
            ConfigError: the cache is smaller than a batch, or the ranks cannot share a batch equally.
        """
        if cfg.end_to_end:
            model = EndToEnd(self.lm, self.scaling)
            return stack.enter_context(SequenceBatches(self._sequences("train"), model, cfg, layout.data))
        order: dict[str, Any] = {"seed": cfg.seed, "batch_tokens": cfg.batch_tokens, "pool_tokens": cfg.pool_tokens}
        order["rows"] = layout.rows(cfg.batch_tokens)
        live = self._live_blocks() if self.cached.mode == "stream" else None
        source = self._store.batches(**order) if live is None else BatchSource(live, **order)
        batches = Batches(
            stack.enter_context(source),
            self.scaling,
            device=distributed.device(),
            targets=self.targets,
            reproduces=self.cached.targets == "inputs",
            together=layout.features,
        )
        stack.enter_context(batches)
        if live is not None:
            # last in, first out: otherwise leaving waits until a whole pool is computed
            stack.enter_context(live)
        return batches

    def heldout(self, *, tokens: int, batch_tokens: int, key: str) -> Iterator[Pair]:
        """Normalised inputs and outputs of the first held-out tokens.

        Args:
            tokens: How many.
            batch_tokens: Most at a time.
            key: Of the option that asks for so many.

        Raises:
            ConfigError: there are fewer.
        """
        rows = self._store if self.cached.mode == "disk" else self._live_heldout()
        there, device = rows.n_tokens("heldout"), distributed.device()
        if tokens > there:
            raise ConfigError(
                f"at most the {there} held-out tokens of the cache",
                found=str(tokens),
                where=key,
                fix="lower it, or cache more held-out tokens (cache.heldout_tokens)",
            )
        scaling = self.scaling.to(device)
        for start in range(0, tokens, batch_tokens):
            stop = min(start + batch_tokens, tokens)
            part = rows.read("heldout", start, stop, outputs=self.cached.targets == "stored")
            x = part.inputs.to(device)
            y = part.outputs.to(device) if part.outputs is not None else x if self.targets is None else self.targets(x)
            yield scaling.inputs(x), scaling.outputs(y)

    def replaced(self, tokens: int) -> Callable[[Transcoder], dict[str, float | None]]:
        """Measures the replacement model on the first held-out tokens."""
        sequences = self._sequences("heldout")
        count = max(1, tokens // sequences.shape[1])
        parts = torch.from_numpy(sequences[:count].astype(np.int64)).split(BEHAVIOUR_SEQUENCES)
        return lambda transcoder: measure_replacement(self.lm, transcoder, parts)

    @cached_property
    def _store(self) -> ActivationStore:
        return ActivationStore.open(self.inputs["cache"])

    @property
    def _world(self) -> Path | None:
        return self.inputs["toyworld"].folder if "toyworld" in self.inputs else None

    @cached_property
    def _tokens(self) -> TokenStore:
        return TokenStore.open(self.inputs["tokenize"])

    def _sequences(self, split: str) -> Int32[np.ndarray, "sequence pos"]:
        """Those of a split that the cache covers."""
        tokens = self._tokens
        count = self.cached.n_sequences(split, tokens.n_sequences(split), tokens.context)
        return tokens.read(split, 0, count)

    def _live_heldout(self) -> LiveActivations:
        sites = sites_of_cache(self.inputs["cache"], self.lm, toyworld=self._world, device=distributed.device())
        return LiveActivations(
            sites,
            {"heldout": self._sequences("heldout")},
            bos_id=self._tokens.bos_id,
            batch_sequences=self.cached.batch_sequences,
            manifest=self.inputs["cache"],
        )

    def _live_blocks(self) -> LiveBlocks:
        """The train split as far as the cache's budget goes, computed while the transcoder trains."""
        return LiveBlocks(
            ExpectedModel.of(
                self.cached, self.inputs["cache"].counts, toyworld=self._world, device=distributed.device()
            ),
            self._sequences("train"),
            bos_id=self._tokens.bos_id,
            batch_sequences=self.cached.batch_sequences,
            outputs=self.cached.targets == "stored",
        )
