"""What stage attribute reads, at the smallest size: a random model and transcoder, the rest made up."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.attribute import AttributeConfig
from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.stores.clt import save_clt
from circuitmill.stores.explanations import EXPLANATIONS, write_explanations
from circuitmill.stores.features import BLOCKS, FEATURES, INDEX, INDEX_ROWS, WINDOWS
from circuitmill.stores.manifest import Manifest, StageOutput
from circuitmill.stores.transcoders import MODEL, TRACED, as_clt, is_plain_clt, save_transcoder

N_LAYERS, N_FEATURES = 2, 20
PROMPT = "The state of Dallas is"
Upstreams = dict[str, Path | None]

CFG = AttributeConfig(
    model=ModelConfig("toyworld", "toyworld", "", "float32"),
    circuits={"two_hop": 2},
    prompts={"mine": "Some other text"},
    max_logits=4,
    logit_mass=0.9,
    max_feature_nodes=500,
    node_threshold=0.8,
    edge_threshold=0.98,
    verify_edges=2,
    feature_windows=2,
)


@dataclass(frozen=True)
class Nothing:
    """The configuration of a stage that is not under test."""


def text_of(layer: int, feature: int) -> str:
    return "fires on “Texas”" if feature % 5 == 0 else f"feature {feature} of layer {layer}"


KEYS = [(layer, feature) for layer in range(N_LAYERS) for feature in range(N_FEATURES)]


def write_block(out: Path) -> None:
    """All features in one block, with one window each."""
    statistics = {
        "density": 0.1,
        "n_active": 10,
        "act_max": 2.0,
        "act_mean": 1.0,
        "histogram": [1, 2],
        "histogram_edges": [0.0, 1.0, 2.0],
        "quantile_values": [0.5],
        "top_logits": [{"token": 7, "text": " Texas", "value": 1.0}],
        "bottom_logits": [{"token": 8, "text": "x", "value": -1.0}],
        "row_group": 0,
    }
    window = {
        "split": "train",
        "kind": "top",
        "rank": 0,
        "quantile": -1,
        "sequence": 0,
        "start": 0,
        "tokens": [3, 4],
        "activations": [0.0, 1.5],
        "peak": 1,
        "word": "b",
        "before": "a",
    }
    names = [{"layer": layer, "feature": feature} for layer, feature in KEYS]
    rows = [{**name, **statistics} for name in names]
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURES), out / "features.parquet")
    rows = [{**name, **window, "texts": [str(key), "b"]} for name, key in zip(names, KEYS, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema=WINDOWS), out / "windows.parquet")


def write_features(out: Path) -> None:
    """The gathered features: the block's digest and the index."""
    block = StageOutput("features", Nothing(), {}, out / "block" / "0000", unit="0000")
    write_block(block.folder)
    digest = block.finish({}).digest
    (out / BLOCKS).write_text(json.dumps([{"name": "0000", "digest": digest}]))
    rows = [{"layer": layer, "feature": feature, "block": "0000", "row_group": 0} for layer, feature in KEYS]
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_ROWS), out / INDEX)


def write_labels(out: Path, before: str = "") -> None:
    rows = [
        {"layer": layer, "feature": feature, "explanation": before + text_of(layer, feature), "n_scored": 0}
        for layer, feature in KEYS
    ]
    write_explanations(out / "explanations.parquet", pa.Table.from_pylist(rows, schema=EXPLANATIONS))


def circuit(prompt: str = PROMPT, name: str = "Texas") -> dict:
    concept = {"name": name, "words": [name], "after": "Dallas"}
    return {"prompt": prompt, "answer": " Austin", "answers": [" Austin"], "concepts": [concept]}


def finish(stage: str, out: Path, inputs: dict[str, Manifest], fill: Callable[[Path], None]) -> Manifest:
    output = StageOutput(stage, Nothing(), inputs, out, keep=("block",))
    fill(out)
    return output.finish({"n_layers": N_LAYERS, "n_features": N_FEATURES})


def random_transcoder(**architecture: object) -> Transcoder:
    """Random weights; many features fire."""
    torch.manual_seed(3)
    transcoder = Transcoder(N_LAYERS, N_FEATURES, 16, ArchitectureConfig(**architecture)).requires_grad_(False)
    for parameter in transcoder.parameters():
        parameter.normal_(std=0.3)
    transcoder.log_threshold.fill_(-1.0)
    return transcoder


def make_graph_upstreams(root: Path, model_dir: Path, transcoder: Transcoder) -> Upstreams:
    """Manifests of everything that attribute reads, the transcoder in the files of stage train."""

    def toyworld(out: Path) -> None:
        shutil.copytree(model_dir, out / "model")
        circuits = {"two_hop": [circuit(), circuit(name="Nowhere")], "long": [circuit("Dallas" + "a" * 40)]}
        (out / "truth.json").write_text(json.dumps({"format": 1, "tasks": {}, "circuits": circuits}))

    def train(out: Path) -> None:
        label = {"scan": "./data/features", "model_name": "tiny"}
        save_transcoder(out / MODEL, transcoder, **label)
        if not is_plain_clt(transcoder) and not transcoder.architecture.untraceable:
            save_clt(out / TRACED, as_clt(transcoder), **label)

    made: dict[str, Manifest] = {}
    for stage, needs, fill in (
        ("toyworld", (), toyworld),
        ("tokenize", ("toyworld",), lambda out: None),
        ("train", (), train),
        ("features", ("toyworld", "tokenize", "train"), write_features),
        ("interpret", ("features",), write_labels),
    ):
        made[stage] = finish(stage, root / stage, {name: made[name] for name in needs}, fill)
    return {name: manifest.folder / "manifest.json" for name, manifest in made.items()}
