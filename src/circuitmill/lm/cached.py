"""What a cache holds, from the models that run now: what a transcoder was trained on, unquantised and of any tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from circuitmill.config.cache import CacheConfig
from circuitmill.config.decode import decode
from circuitmill.errors import UpstreamError
from circuitmill.lm.load import LanguageModel
from circuitmill.lm.sites import Sites, load_sites


@runtime_checkable
class CacheRecord(Protocol):
    """The manifest of stage cache."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration as plain data."""
        ...

    @property
    def counts(self) -> Mapping[str, Any]:
        """Which models it was made with, among others."""
        ...

    @property
    def folder(self) -> Path:
        """Where it is, for messages."""
        ...


def sites_of_cache(cache: CacheRecord, lm: LanguageModel, *, toyworld: Path | None, device: torch.device) -> Sites:
    """The places of a cache, of its models.

    Args:
        cache: Its manifest.
        lm: Its model, or the first of its two, which is loaded already.
        toyworld: Output folder of stage toyworld; needed for the embedded model only.
        device: Where a second model runs.

    Raises:
        ConfigError: a second model cannot be loaded.
        UpstreamError: the cache was made with other models.
    """
    sites = load_sites(decode(CacheConfig, cache.config, "cache"), toyworld=toyworld, device=device, first=lm)
    for (name, digest), model in zip(sites.digests.items(), sites.lms, strict=True):
        if digest != cache.counts[name]:
            raise UpstreamError(
                f"a cache of model {model.name} ({digest[:12]})",
                found=f"one of a model with digest {cache.counts[name][:12]}",
                where=cache.folder / "manifest.json",
                fix="run stages cache and train again with this model",
            )
    return sites
