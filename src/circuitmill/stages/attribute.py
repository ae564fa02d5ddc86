"""Stage `attribute`: an attribution graph per prompt, and what the graphs say about known circuits.

Unit `prompt/<name>/`:

| written | what |
|---|---|
| graph.json | the pruned graph in circuit-tracer's format, explanations in `clerp` |
| scores.json | scores, sizes and targets of the graph, the check of its edges, what its circuit expects |

Gather:

| written | what |
|---|---|
| graph-metadata.json | index of the graphs |
| graph_data/<name>.json | the graphs |
| features/<id>.json | one file per feature of any graph; id is the Cantor number of (layer, feature) |
| summary.json | `graphs`: the figures of every graph with the features that name known concepts; totals |

Of a transcoder that cannot be traced there are no units: `graphs` is empty and `undefined` says why.
"""

import dataclasses
from pathlib import Path

import pyarrow as pa

from circuitmill import distributed
from circuitmill.config.attribute import AttributeConfig
from circuitmill.errors import ConfigError, DivergedError, UpstreamError
from circuitmill.graphs import summary
from circuitmill.graphs.prompts import encode
from circuitmill.graphs.truth import Circuit, Named, find_circuit, load_circuits
from circuitmill.logs import progress
from circuitmill.stores.explanations import ExplanationStore
from circuitmill.stores.features import FeatureStore
from circuitmill.stores.graphs import feature_document, graph_features, read_graph, read_json, write_index, write_json
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest, load_upstreams, plain
from circuitmill.stores.transcoders import MODEL, circuit_tracer_folder, read_architecture

EDGE_TOLERANCE = 1e-3
"""Largest difference between an edge and an intervention, relative to the largest edge (or 1)."""

Key = tuple[int, int]
"""Layer and feature."""


def run_unit(
    cfg: AttributeConfig,
    *,
    prompt: str,
    toyworld: Path | None,
    tokenize: Path,
    train: Path,
    features: Path,
    interpret: Path,
    out: Path,
) -> Manifest:
    """Trace, check, prune, score and write the graph of one prompt.

    Raises:
        ConfigError: an unknown prompt, an empty one or one longer than the context; a model or a transcoder that cannot
            be traced.
        UpstreamError: an upstream is missing or does not fit; no feature of the transcoder is active on the prompt.
        DivergedError: an edge differs from what an intervention does.
    """
    # models take seconds to import, which gathering does without
    from circuitmill.graphs.export import graph_document
    from circuitmill.graphs.interventions import verify_edges
    from circuitmill.graphs.prune import prune, scores
    from circuitmill.graphs.tracer import replacement_model, trace
    from circuitmill.lm.load import load_language_model

    inputs = load_upstreams(toyworld=toyworld, tokenize=tokenize, train=train, features=features, interpret=interpret)
    _require_graphs(inputs["train"])
    circuit = _circuit(cfg, prompt, inputs)
    text = cfg.prompts[prompt] if circuit is None else circuit.prompt
    output = StageOutput("attribute", cfg, inputs, out, unit=prompt)
    lm = load_language_model(
        dataclasses.replace(cfg.model, dtype="float32"),
        toyworld=inputs["toyworld"].folder if "toyworld" in inputs else None,
        device=distributed.device(),
    )
    ids = encode(lm.tokenizer, text, name=prompt, bos_id=lm.bos_id, context=lm.context)
    expected = circuit and summary.expectation(cfg.circuit_of()[prompt][0], circuit, lm.tokenizer)
    replaced = replacement_model(lm.pretrained, lm.tokenizer, circuit_tracer_folder(inputs["train"].folder), ids)
    graph = trace(
        replaced,
        ids,
        prompt=text,
        max_logits=cfg.max_logits,
        logit_mass=cfg.logit_mass,
        max_feature_nodes=cfg.max_feature_nodes,
    )
    pruned, found = prune(graph, cfg.node_threshold, cfg.edge_threshold), scores(graph)
    check = None
    if cfg.verify_edges:
        most = pruned.influence[: graph.n_features].argsort(stable=True)[: cfg.verify_edges]
        check = verify_edges(replaced, graph, most.tolist())
        _require_edges(check.relative, prompt)
    kept = graph.features[pruned.nodes[: graph.n_features]]
    labels = _labels(inputs["interpret"], {(layer, feature) for layer, _, feature in kept.tolist()})
    document = graph_document(graph, pruned, found, slug=prompt, node_threshold=cfg.node_threshold, labels=labels)
    figures = summary.record(prompt, graph, document, found, check, expected)
    write_json(output.path("graph.json"), document)
    write_json(output.path("scores.json"), figures)
    return output.finish({key: figures[key] for key in (*summary.SCORES, "n_active", "n_nodes", "n_links")})


def _undefined(train: Manifest) -> str:
    """Why a transcoder has no graphs; empty if it has."""
    return read_architecture(train.folder / MODEL).untraceable


def _require_graphs(train: Manifest) -> None:
    reason = _undefined(train)
    if reason:
        raise ConfigError(
            "a transcoder that can be traced",
            found=reason,
            where=train.folder / MODEL,
            fix="trace a transcoder of topology clt or plt without skip and pair_offset",
        )


def _require_configured(cfg: AttributeConfig, train: Manifest) -> None:
    """The configuration is that of a variant with such a transcoder: its units are what there is to gather."""
    reason = _undefined(train)
    if bool(reason) != bool(cfg.undefined):
        raise ConfigError(
            f"{reason!r}, as the architecture of the transcoder has it",
            found=repr(cfg.undefined),
            where="attribute.undefined",
            fix="give the configuration of the run and variant that trained this transcoder, or the same "
            "train.architecture",
        )


def _circuit(cfg: AttributeConfig, prompt: str, inputs: dict[str, Manifest]) -> Circuit | None:
    """The circuit that a prompt is, None for a prompt of the configuration's own."""
    if prompt not in cfg.units():
        raise ConfigError(
            "a prompt among " + ", ".join(cfg.units()), found=prompt, where="--prompt", fix="name one of them"
        )
    if prompt in cfg.prompts:
        return None
    if "toyworld" not in inputs:
        raise ConfigError(
            "the output of stage toyworld, which knows the circuits",
            found="none",
            where="--toyworld",
            fix="pass its manifest, or set attribute.circuits={}",
        )
    return find_circuit(load_circuits(inputs["toyworld"].file("truth.json")), *cfg.circuit_of()[prompt])


def _require_edges(relative: float, prompt: str) -> None:
    if not relative <= EDGE_TOLERANCE:
        raise DivergedError(
            f"edges equal to interventions within {EDGE_TOLERANCE:g} of the largest",
            found=f"a difference of {relative:.2g}",
            where=f"prompt {prompt}",
            fix="report the prompt: tracing is wrong for this model or this transcoder",
        )


def _labels(interpret: Manifest, wanted: set[Key]) -> dict[Key, str]:
    """The explanations of some features."""
    return {key: row["explanation"] for key, row in ExplanationStore.open(interpret).rows(wanted).items()}


def run(
    cfg: AttributeConfig,
    *,
    toyworld: Path | None,
    tokenize: Path,
    train: Path,
    features: Path,
    interpret: Path,
    out: Path,
) -> Manifest:
    """Gather the graphs: index, feature files, and what they say about known circuits.

    Raises:
        ConfigError: the configuration is that of another architecture.
        UpstreamError: a prompt's graph is missing, or was made with another configuration or from other inputs.
    """
    inputs = load_upstreams(toyworld=toyworld, tokenize=tokenize, train=train, features=features, interpret=interpret)
    _require_configured(cfg, inputs["train"])
    units = {name: _unit(cfg, name, inputs, out) for name in cfg.units()}
    output = StageOutput("attribute", cfg, inputs, out, keep=("prompt",))
    documents = {name: read_graph(unit.file("graph.json")) for name, unit in units.items()}
    nodes = [node for document in documents.values() for node in graph_features(document)]
    named = _write_features(cfg, inputs, sorted({(node["layer"], node["feature"]) for node in nodes}), output)
    graphs = []
    for name, document in documents.items():
        write_json(output.path("graph_data", f"{name}.json"), document)
        graphs.append(summary.with_concepts(read_json(units[name].file("scores.json")), document, named))
    write_index(output.path("graph-metadata.json"), documents.values())
    totals = summary.totals(graphs)
    figures = {**totals, "undefined": cfg.undefined or None}
    write_json(output.path("summary.json"), {"graphs": graphs, **figures})
    return output.finish({"n_graphs": len(graphs), "n_features": len(named), **figures})


def _unit(cfg: AttributeConfig, name: str, inputs: dict[str, Manifest], out: Path) -> Manifest:
    unit = load_manifest(out / "prompt" / name / "manifest.json", "attribute", name)
    same = unit.config == plain(cfg)
    if not same or unit.inputs != {source: manifest.digest for source, manifest in inputs.items()}:
        raise UpstreamError(
            f"the graph of {name} made with this configuration and from these inputs",
            found="one made from other inputs" if same else "one made with another configuration",
            where=unit.folder / "manifest.json",
            fix=f"circuitmill attribute --prompt {name}, then gather again",
        )
    return unit


def _write_features(
    cfg: AttributeConfig, inputs: dict[str, Manifest], wanted: list[Key], output: StageOutput
) -> dict[Key, Named]:
    """Write the file of every feature in a graph; say what each is."""
    store = FeatureStore.open(inputs["features"])
    # the table holds every feature, sorted by layer and feature
    places = pa.array([layer * store.n_features + feature for layer, feature in wanted], pa.int64())
    rows = store.features().take(places).to_pylist()
    windows, labels = store.windows_of(wanted), _labels(inputs["interpret"], set(wanted))
    named = {}
    with progress("feature files", total=len(wanted), unit="features") as bar:
        for key, row in zip(wanted, rows, strict=True):
            document = feature_document(row, windows[key], cfg.feature_windows, cfg.model.name)
            write_json(output.path("features", f"{document['index']}.json"), {**document, "explanation": labels[key]})
            named[key] = Named(labels[key], tuple(document["top_logits"]))
            bar.advance(1)
    return named
