"""Stage evaluate: fit, sparsity and the replacement model, on held-out tokens of the live model.

Activations are the model's own, not the cache's quantised ones, at the places that the cache names: MLP inputs and
outputs, or for autoencoders and crosscoders a hookpoint of one model or two. BOS positions count for nothing, and the
replacement model keeps the model's own MLP outputs there. A transcoder that does not stand for MLPs has no replacement
model: `unreplaceable` says why. "Dead" means: no firing on the evaluated held-out tokens.

| file | row | content |
|---|---|---|
| evaluation.json | | every figure; `docs/stages/evaluate.md` says what each is |
| layers.parquet | layer | explained variance, NMSE, L0 with percentiles, dead, what replacing it alone does |
| features.parquet | layer, feature | n_active (tokens), density |
| l0.parquet | number of features | tokens on which so many fire, over all layers |
| tasks.parquet | task | accuracy of the model, the replacement and the mean-ablated model; embedded model only |
| plots/*.svg | | figures |
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitmill import distributed
from circuitmill.config.evaluate import EvaluateConfig
from circuitmill.core import summaries
from circuitmill.core.metrics import Firing
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, UpstreamError
from circuitmill.lm.cached import sites_of_cache
from circuitmill.lm.load import LanguageModel, load_language_model, tokenizer_digest
from circuitmill.lm.measure import changed_models, measure_behaviour, measure_fit, measure_one_layer
from circuitmill.lm.replacement import original_logits
from circuitmill.logs import progress
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import NAME, Manifest, StageOutput, load_upstreams
from circuitmill.stores.tokens import TokenStore, write_parquet
from circuitmill.stores.transcoders import load_transcoder
from circuitmill.toyworld.tasks import score_tasks
from circuitmill.viz import plots

BATCH_NUMBERS = 2**25
"""Activations or logits held at once."""


def run(
    cfg: EvaluateConfig, *, tokenize: Path, cache: Path, train: Path, toyworld: Path | None = None, out: Path
) -> Manifest:
    """Measure a trained transcoder.

    Raises:
        ConfigError: a budget below one sequence, or a model that cannot be loaded.
        ShapeError: the transcoder was made for a model of another shape.
        StoreError: an input is damaged.
        UpstreamError: the output of an earlier stage is missing or stale, or made with another model or tokenizer.
    """
    upstreams = load_upstreams(toyworld=toyworld, tokenize=tokenize, cache=cache, train=train)
    world, device = upstreams.get("toyworld"), distributed.device()
    folder = world.folder if world else None
    lm = load_language_model(cfg.model, toyworld=folder, device=device)
    sites = sites_of_cache(upstreams["cache"], lm, toyworld=folder, device=device)
    transcoder = load_transcoder(upstreams["train"].folder / "model").to(device)
    store = _token_store(upstreams["tokenize"], lm)
    output = StageOutput("evaluate", cfg, upstreams, out)

    size = max(BATCH_NUMBERS // max(transcoder.n_sources * transcoder.n_features, lm.d_vocab) // store.context, 1)
    n_sequences = _n_sequences(store, cfg.max_tokens, "max_tokens")
    fit = measure_fit(sites, transcoder, _batches("fit", store, n_sequences, size))
    edges, counts = summaries.density_histogram(fit.firing.n_active.cpu(), fit.firing.n_tokens, cfg.density_bins)
    document = {
        "format": 2,
        "model": lm.name,
        "transcoder": {
            "topology": transcoder.architecture.topology,
            **{name: getattr(transcoder, name) for name in ("n_layers", "n_sources", "n_features", "d_model")},
        },
        "places": list(sites.places),
        "tokens": {
            "split": "heldout",
            "bos": "excluded",
            "sequences": n_sequences,
            "evaluated": fit.firing.n_tokens,
        },
        "fit": summaries.fit_summary(fit.explained),
        "sparsity": summaries.sparsity_summary(fit.firing),
        "density_histogram": {"log10_edges": edges, "counts": counts},
        "unreplaceable": transcoder.architecture.unreplaceable or None,
        **dict.fromkeys(("behaviour", "one_layer", "tasks")),
    }
    if document["unreplaceable"] is None:
        _add_behaviour(document, cfg, lm, transcoder, fit.mean_outputs, store, size)
        if world is not None:
            document["tasks"] = _tasks(cfg, lm, transcoder, fit.mean_outputs, world)
    _write(output, document, fit.firing)
    return output.finish(_headline(document))


def _add_behaviour(
    document: dict,
    cfg: EvaluateConfig,
    lm: LanguageModel,
    transcoder: Transcoder,
    mean: Float[Tensor, "layer d_model"],
    store: TokenStore,
    size: int,
) -> None:
    """Measure what replacing MLPs does: all of them, and one layer at a time."""
    n_sequences = document["tokens"]["sequences"]
    n_one_layer = min(n_sequences, _n_sequences(store, cfg.max_one_layer_tokens, "max_one_layer_tokens"))
    models = {"original": lambda tokens: original_logits(lm, tokens)} | changed_models(lm, transcoder, mean)
    found = measure_behaviour(lm, models, _batches("replacement model", store, n_sequences, size))
    original = found.pop("original")
    document["tokens"] |= {"predicted": original.n_predicted, "one_layer_sequences": n_one_layer}
    document["behaviour"] = {
        "original": {"cross_entropy": summaries.number(original.cross_entropy())},
        **summaries.behaviour_summary(found, original.cross_entropy()),
    }
    batches = _batches("one layer at a time", store, n_one_layer, size)
    document["one_layer"] = measure_one_layer(lm, transcoder, mean, batches)


def _token_store(tokenize: Manifest, lm: LanguageModel) -> TokenStore:
    store, digest = TokenStore.open(tokenize), tokenizer_digest(lm.tokenizer)
    if digest != tokenize.counts["tokenizer_digest"]:
        raise UpstreamError(
            f"tokens made by the tokenizer of model {lm.name} ({digest[:12]})",
            found=f"tokens of {tokenize.counts['tokenizer_digest'][:12]}",
            where=tokenize.folder / NAME,
            fix="run stage tokenize again with this model",
        )
    return store


def _n_sequences(store: TokenStore, max_tokens: int | None, key: str) -> int:
    there = store.n_sequences("heldout")
    if max_tokens is None:
        return there
    if max_tokens < store.context:
        raise ConfigError(
            f"a budget of at least one sequence ({store.context} tokens)",
            found=f"{max_tokens} tokens",
            where=f"evaluate.{key}",
            fix="raise the budget, or set null to take all",
        )
    return min(there, max_tokens // store.context)


def _batches(description: str, store: TokenStore, n_sequences: int, size: int) -> Iterator[Int[Tensor, "sequence pos"]]:
    with progress(f"evaluating, {description}", total=n_sequences * store.context, unit="tokens") as bar:
        for start in range(0, n_sequences, size):
            tokens = torch.from_numpy(store.read("heldout", start, min(start + size, n_sequences)).astype(np.int64))
            yield tokens
            bar.advance(tokens.numel())


def _tasks(
    cfg: EvaluateConfig,
    lm: LanguageModel,
    transcoder: Transcoder,
    mean: Float[Tensor, "layer d_model"],
    world: Manifest,
) -> list[dict]:
    """Accuracy of the model, the replacement model and the mean-ablated model on every task."""
    tasks = json.loads(world.file("truth.json").read_text())["tasks"]
    models = {"original": lambda tokens: original_logits(lm, tokens)} | changed_models(lm, transcoder, mean)
    del models["zero_ablation"]
    scores = {}
    with progress("evaluating, tasks", total=len(models) * len(tasks), unit="tasks") as bar:
        for model, logits_of in models.items():
            scores[model] = score_tasks(tasks, lm.tokenizer, logits_of, limit=cfg.max_task_items)
            bar.advance(len(tasks))
    return [
        {"name": name, "n": scores["original"][name].n} | {model: part[name].accuracy for model, part in scores.items()}
        for name in tasks
    ]


def _write(output: StageOutput, document: dict, firing: Firing) -> None:
    atomic_write(output.path("evaluation.json"), json.dumps(document, indent=1, allow_nan=False) + "\n")
    tables = summaries.tables(document, firing)
    for name, columns in tables.items():
        table = pa.table({key: _column(values) for key, values in columns.items()})
        write_parquet(output.path(f"{name}.parquet"), table, table.num_rows)
    for name, svg in plots.plot_evaluation(document, tables["l0"]["tokens"]).items():
        atomic_write(output.path("plots", f"{name}.svg"), svg)


def _column(values: list) -> pa.Array:
    """A column of a table; figures that are all undefined are numbers too."""
    return pa.array(values, pa.float64() if all(value is None for value in values) else None)


def _headline(document: dict) -> dict:
    replacement = document["behaviour"]["replacement"] if document["behaviour"] else {}
    return {
        **document["transcoder"],
        "tokens": document["tokens"]["evaluated"],
        "explained_variance": document["fit"]["explained_variance"],
        "l0": document["sparsity"]["l0"],
        "dead": document["sparsity"]["dead"],
        "dead_share": document["sparsity"]["dead_share"],
        **{key: replacement.get(key) for key in ("agreement", "kl", "ce_recovered_zero", "ce_recovered_mean")},
        "unreplaceable": document["unreplaceable"],
        "tasks": None
        if document["tasks"] is None
        else {row["name"]: [row["original"], row["replacement"]] for row in document["tasks"]},
    }
