"""A made-up run on disk: every manifest and file that stage report reads, in the formats of the stages before it."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tests.viz import synthetic

from circuitmill import pipeline
from circuitmill.config.compose import load_run
from circuitmill.stores.explanations import EXPLANATIONS, FILE, write_explanations
from circuitmill.stores.feature_writer import write_index, write_windows
from circuitmill.stores.features import BLOCKS, FEATURES, GROUP_FEATURES, INDEX, WINDOWS, block_span
from circuitmill.stores.graphs import write_json
from circuitmill.stores.manifest import NAME, Manifest, StageOutput, load_manifest
from circuitmill.stores.metrics import METRICS, THROUGHPUT, parted
from circuitmill.stores.tensors import write_tensors
from circuitmill.stores.tokens import write_parquet

N_BLOCKS = 2
_CACHED = {"n_layers": synthetic.N_LAYERS, "d_model": 32, "tokens": {"train": 4096, "heldout": 1024}}
Fill = Callable[[StageOutput], dict]


@functools.cache
def stage_config(stage: str) -> Any:
    """The stage's configuration in the smallest run."""
    run = load_run("tiny")
    return run.config(stage, "" if pipeline.stage(stage).shared else "main")


def write_run(
    results: Path,
    variant: str = "main",
    l0: float = 28.0,
    steps: int = 40,
    *,
    seed: int = 0,
    codec: str | None = None,
    topology: str = "clt",
) -> dict[str, Path]:
    """Write all stages before report; returns their manifests' paths as stage report takes them.

    Args:
        seed: Decides features and graphs.
        codec: With it the cache lies in the folder of variant `<codec>-0`, which shares it.
        topology: With another than clt no MLPs are replaced and there are no graphs.
    """
    made: dict[str, Manifest] = {}

    def stage(name: str, cfg: Any, fill: Fill, *, home: str = variant, upstream: tuple[str, ...] = ()) -> None:
        out = results / home / name
        inputs = {key: made[key] for key in upstream}
        units = cfg.units() if hasattr(cfg, "units") else ()
        word = pipeline.stage(name).unit
        for unit in units:
            part = StageOutput(name, cfg, inputs, out / word / unit, unit=unit)
            part.finish(_unit(name, unit, part))
        volatile = (THROUGHPUT,) if name == "train" else ()
        output = StageOutput(name, cfg, inputs, out, keep=(word,) if word else (), volatile=volatile)
        made[name] = output.finish(fill(output))

    stage("toyworld", stage_config("toyworld"), _toyworld, home="")
    stage("tokenize", stage_config("tokenize"), lambda output: {}, home="", upstream=("toyworld",))
    before = ("toyworld", "tokenize")
    stage("calibrate", stage_config("calibrate"), lambda output: {}, home="", upstream=before)
    cache = replace(stage_config("cache"), **({"codec": codec} if codec else {}))
    home = f"{codec}-0" if codec else ""
    stage("cache", cache, lambda output: _CACHED, home=home, upstream=(*before, "calibrate"))
    train = replace(stage_config("train"), seed=seed)
    stage("train", train, lambda output: _train(output, steps, seed), upstream=(*before, "cache"))
    upstream = (*before, "cache", "train")
    stage("evaluate", stage_config("evaluate"), lambda output: _evaluate(output, l0, topology), upstream=upstream)
    features = replace(stage_config("features"), blocks=N_BLOCKS)
    stage("features", features, _features, upstream=upstream)
    stage("interpret", stage_config("interpret"), _interpret, upstream=("features",))
    attribute = replace(stage_config("attribute"), circuits={"two_hop": 2}, prompts={"own": "Some text"})
    if topology != "clt":
        attribute = replace(attribute, undefined=f"topology {topology} does not replace MLPs")
    fill = functools.partial(_attribute, seed=seed, undefined=attribute.undefined or None)
    stage("attribute", attribute, fill, upstream=(*before, "train", "features", "interpret"))
    return {name: made[name].folder / NAME for name in pipeline.stage("report").upstream}


def _unit(stage: str, unit: str, output: StageOutput) -> dict:
    if stage == "features":
        _write_block(unit, output)
    return {}


def _toyworld(output: StageOutput) -> dict:
    tasks = {"two_hop_city": {"description": "capital of a <city>'s state", "rule": "first_token", "items": []}}
    write_json(output.path("truth.json"), {"format": 1, "tasks": tasks, "circuits": {}})
    return {}


def _train(output: StageOutput, steps: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(synthetic.N_LAYERS):
        shape = (synthetic.N_FEATURES, synthetic.N_LAYERS - layer, 32)
        decoder = torch.randn(*shape, generator=generator)
        write_tensors(output.path("model", f"W_dec_{layer}.safetensors"), {f"W_dec_{layer}": decoder})
    parts = [parted(row) for row in synthetic.metrics(steps)]
    for name, rows in zip((METRICS, THROUGHPUT), zip(*parts, strict=True), strict=True):
        output.path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def _evaluate(output: StageOutput, l0: float, topology: str) -> dict:
    document = synthetic.evaluation_document(l0)
    if topology != "clt":
        document = synthetic.unreplaceable_document(topology, l0)
    write_json(output.path("evaluation.json"), document)
    output.path("plots", "l0.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"/>')
    return {}


def _write_block(block: str, output: StageOutput) -> None:
    span = block_span(block, N_BLOCKS, synthetic.N_FEATURES)
    keys = [(layer, feature) for layer in range(synthetic.N_LAYERS) for feature in range(span.start, span.stop)]
    rows = [synthetic.feature_row(*key) for key in keys]
    extra = {"sequence": 0, "start": 0, "word": "", "before": ""}
    groups = []
    for low in range(0, len(rows), GROUP_FEATURES):
        part = rows[low : low + GROUP_FEATURES]
        windows = [w for row in part for w in synthetic.windows(row["layer"], row["feature"], row["act_max"])]
        table = [{**window, **extra, "tokens": list(range(len(window["texts"])))} for window in windows]
        groups.append(pa.Table.from_pylist(table, schema=WINDOWS))
    numbers = write_windows(output.path("windows.parquet"), groups)
    numbered = [{**row, "row_group": numbers[place // GROUP_FEATURES]} for place, row in enumerate(rows)]
    write_parquet(output.path("features.parquet"), pa.Table.from_pylist(numbered, schema=FEATURES), len(numbered))


def _features(output: StageOutput) -> dict:
    names = [f"{block:04d}" for block in range(N_BLOCKS)]
    blocks = {name: load_manifest(output.folder / "block" / name / NAME, "features", name) for name in names}
    sizes = {"n_layers": synthetic.N_LAYERS, "n_features": synthetic.N_FEATURES}
    write_index(blocks, output.path(INDEX), output.path(BLOCKS), **sizes)
    return sizes


def _interpret(output: StageOutput) -> dict:
    keys = [(layer, feature) for layer in range(synthetic.N_LAYERS) for feature in range(synthetic.N_FEATURES)]
    rows = [{**synthetic.explanation_row(*key), "rule": None} for key in keys]
    write_explanations(output.path(FILE), pa.Table.from_pylist(rows, schema=EXPLANATIONS))
    return {}


def _attribute(output: StageOutput, seed: int, undefined: str | None) -> dict:
    graphs = []
    prompts = (("two_hop-00", "two_hop", 0), ("two_hop-01", "two_hop", 1), ("own", None, 2))
    for name, kind, city in () if undefined else prompts:
        document = synthetic.graph(name, *synthetic.CITIES[city], seed=city + 100 * seed)
        write_json(output.path("graph_data", f"{name}.json"), document)
        graphs.append(synthetic.summary(name, kind, *synthetic.CITIES[city][1:], document))
    write_json(output.path("summary.json"), {"graphs": graphs, "undefined": undefined})
    return {"n_graphs": len(graphs)}
