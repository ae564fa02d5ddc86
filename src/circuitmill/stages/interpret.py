"""Stage interpret: an explanation for every feature, and how well it predicts the feature on held-out windows.

1. The explainer reads a feature's train windows and logits (`autointerp.explain`).
2. Detection asks, for every held-out window, whether the feature fires in it, given the explanation alone
   (`autointerp.scorers`). Explanations by `tokens` carry a rule, which a program applies.

A unit (block) and the gather write explanations.parquet (stores/explanations.py has the columns,
`docs/stages/interpret.md` their meaning); the gather also summary.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from circuitmill.autointerp.clients import Client, RuleJudge
from circuitmill.autointerp.examples import Examples, examples_of
from circuitmill.autointerp.explain import Explainer, TokenExplainer
from circuitmill.autointerp.scorers import detection
from circuitmill.autointerp.search import SearchOptions
from circuitmill.config.interpret import InterpretConfig
from circuitmill.errors import UpstreamError
from circuitmill.logs import progress
from circuitmill.stores.explanations import (
    FILE,
    ExplanationStore,
    explanations_table,
    repeated_or_missing,
    write_explanations,
)
from circuitmill.stores.features import FeatureStore
from circuitmill.stores.files import atomic_write
from circuitmill.stores.manifest import NAME, Manifest, StageOutput, load_manifest, load_upstreams, plain

SUMMARY = "summary.json"
_DEAD = "dead:"


def run_unit(cfg: InterpretConfig, *, block: str, features: Path, out: Path) -> Manifest:
    """Explain the features of one block and score the explanations.

    Raises:
        UpstreamError: the features are missing, stale, or cut into other blocks.
        StoreError: a table is damaged.
        ClientError: a client failed for good.
    """
    upstreams = load_upstreams(features=features)
    store = FeatureStore.open(upstreams["features"])
    _require_blocks(cfg, store)
    output = StageOutput("interpret", cfg, upstreams, out, unit=block)
    explainer, judge = _explainer(cfg, store), RuleJudge()
    table, windows = store.features(block), store.windows(block)
    rows = []
    with progress(f"interpret {block}", total=len(table), unit="features") as bar:
        for examples in examples_of(table, windows):
            rows.append(_row(cfg, explainer, judge, examples))
            bar.advance(1)
    explanations = explanations_table(rows)
    write_explanations(output.path(FILE), explanations)
    return output.finish(_counts(explanations))


def run(cfg: InterpretConfig, *, features: Path, out: Path) -> Manifest:
    """Gather the blocks: check that they cover every feature once, and sum the scores up.

    Raises:
        UpstreamError: a block is missing, stale or incomplete, or made with another configuration or other features.
        StoreError: a table is damaged.
    """
    upstreams = load_upstreams(features=features)
    blocks = [load_manifest(out / "block" / name / NAME, "interpret", name) for name in cfg.units()]
    for block in blocks:
        _require_matching(block, plain(cfg), {"features": upstreams["features"].digest})
    table = pa.concat_tables([ExplanationStore.open(block).table() for block in blocks])
    counts = upstreams["features"].counts
    problem = repeated_or_missing(table, counts["n_layers"], counts["n_features"])
    if problem:
        raise UpstreamError(
            f"one explanation for each of {counts['n_layers']} x {counts['n_features']} features",
            found=problem,
            where=out / "block",
            fix="delete the folder and run stage interpret again",
        )
    output = StageOutput("interpret", cfg, upstreams, out, keep=("block",))
    write_explanations(output.path(FILE), table)
    summary = _counts(table)
    layers = table["layer"].to_numpy()
    per_layer = [
        {"layer": layer, **_counts(table.filter(pa.array(layers == layer)))} for layer in range(counts["n_layers"])
    ]
    atomic_write(output.path(SUMMARY), json.dumps({**summary, "per_layer": per_layer}, indent=1) + "\n")
    return output.finish(summary)


def _explainer(cfg: InterpretConfig, store: FeatureStore) -> Explainer:
    options = cfg.tokens
    return TokenExplainer(
        search=SearchOptions(options.cost, options.max_clauses, options.min_gain),
        n_tokens=store.manifest.counts["tokens"]["train"],
        min_windows=options.min_windows,
        max_listed=options.max_listed,
        max_words=options.max_words,
        max_promoted=options.max_promoted,
        min_separation=options.min_separation,
    )


def _row(cfg: InterpretConfig, explainer: Explainer, judge: Client, examples: Examples) -> dict[str, Any]:
    explanation = explainer.explain(examples)
    score = detection(explanation, examples.heldout, judge, min_windows=cfg.detection.min_windows)
    return {
        "layer": examples.layer,
        "feature": examples.feature,
        "explanation": explanation.text,
        "explainer": explanation.explainer,
        "rule": explanation.rule,
        "detection": score.balanced_accuracy,
        "precision": score.precision,
        "recall": score.recall,
        "n_scored": score.n,
        "words": explanation.words,
        "promotes": explanation.promotes,
    }


def _counts(table: pa.Table) -> dict[str, Any]:
    """How many features have an explanation and a score, and the scores in short."""
    explained = len(table) - table["rule"].null_count
    dead = sum(text.startswith(_DEAD) for text in table["explanation"].to_pylist())
    scores = table["detection"].drop_null().to_numpy().astype(np.float64)
    figures = {
        "detection_mean": scores.mean,
        "detection_median": lambda: np.median(scores),
        "share_from_70": lambda: (scores >= 0.7).mean(),
        "share_from_80": lambda: (scores >= 0.8).mean(),
    }
    return {
        "features": len(table),
        "explained": explained,
        "dead": dead,
        "rare": len(table) - explained - dead,
        "scored": len(scores),
        **{name: round(float(figure()), 4) if len(scores) else None for name, figure in figures.items()},
    }


def _require_blocks(cfg: InterpretConfig, store: FeatureStore) -> None:
    if store.blocks != cfg.units():
        raise UpstreamError(
            f"features in the {cfg.blocks} blocks of interpret.blocks",
            found=f"{len(store.blocks)} blocks",
            where=store.manifest.folder / NAME,
            fix="set interpret.blocks to features.blocks",
        )


def _require_matching(block: Manifest, config: dict, inputs: dict[str, str]) -> None:
    """A block of this configuration and these features."""
    for what, found, expected in (("configuration", block.config, config), ("features", block.inputs, inputs)):
        if found != expected:
            raise UpstreamError(
                f"block {block.unit} with this run's {what}",
                found="another",
                where=block.folder / NAME,
                fix=f"run block {block.unit} of stage interpret again",
            )
