"""Stage `report`: the browsable page of one variant, as a folder that opens from disk and without network.

| written | what |
|---|---|
| index.html, graph.html, features.html, feature.html | overview, graph viewer, search, one feature |
| tables.html | the overview's figures and the list of graphs, in one file that needs no other |
| static/ | scripts and styles |
| data/ | figures, graphs and features as scripts that register themselves |
| plots/ | the plots that evaluate drew |
| summary.json | headline figures, as `circuitmill summary` prints them |
| study.json | what a difference in a shared stage does; only if variants differ in one |
| usage.json, data/usage.js | what the stages before took: not in the manifest's digest |
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from circuitmill.config.report import ReportConfig
from circuitmill.logs import progress
from circuitmill.stages.report_usage import usage_of
from circuitmill.stores.explanations import ExplanationStore
from circuitmill.stores.features import FeatureStore
from circuitmill.stores.graphs import read_graph, read_json, write_json
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest, load_upstreams
from circuitmill.stores.usage import RunUsage
from circuitmill.viz import evaluation_view, feature_view, graph_view, pages, run_view, summary
from circuitmill.viz import study as studies
from circuitmill.viz.curves import read_metrics
from circuitmill.viz.site import write_data

READ_FEATURES = 256
"""Features whose windows are in memory at a time."""


def run(
    cfg: ReportConfig,
    *,
    toyworld: Path | None,
    tokenize: Path,
    cache: Path,
    train: Path,
    evaluate: Path,
    features: Path,
    interpret: Path,
    attribute: Path,
    siblings: tuple[Path, ...] = (),
    study: tuple[Path, ...] = (),
    benchmarks: Path | None = None,
    out: Path,
) -> Manifest:
    """Write the page.

    Args:
        siblings: Manifests of stage evaluate of the run's other variants.
        study: If variants differ in shared stages, of all variants: manifests of those, train, evaluate and attribute.
        benchmarks: Folder of the run's benchmark files. They say what jobs used, which no other figure depends on.

    Raises:
        UpstreamError: an upstream is missing, incomplete or does not fit the others.
        StoreError: a file of an upstream is damaged.
    """
    inputs = load_upstreams(
        toyworld=toyworld,
        tokenize=tokenize,
        cache=cache,
        train=train,
        evaluate=evaluate,
        features=features,
        interpret=interpret,
        attribute=attribute,
    )
    others = [load_manifest(path, "evaluate") for path in siblings]
    members = studies.read_members(study)
    sources = {f"evaluate of {run_view.variant_name(one)}": one.digest for one in others}
    sources |= {f"study of {member.name}": member.digest for member in members}
    found = run_view.all_manifests(inputs)
    usage = usage_of(run_view.run_folder(inputs["train"]), [one for each in found.values() for one in each], benchmarks)
    output = StageOutput("report", cfg, inputs, out, sources=sources, volatile=pages.VOLATILE)
    stages = run_view.stage_facts(found)
    content = _content(inputs, others, stages, usage, studies.study_document(members) if members else None)
    pages.write_graphs(output.path, content)
    documents = {document["metadata"]["slug"]: document for document in content.graphs}
    n_pages = _write_features(cfg, inputs, graph_view.occurrences(documents), output)
    pages.write_overview(output.path, content, chunk_features=cfg.chunk_features, pages=n_pages)
    pages.write_usage(output.path, content)
    tiles = pages.tiles(content)
    write_json(output.path(summary.FILE), summary.summary_document(content.run, content.variant, tiles))
    if content.study is not None:
        write_json(output.path(summary.STUDY), content.study)
    concepts, known = pages.concepts_found(content.entries)
    return output.finish(
        {
            "graphs": len(content.graphs),
            "feature_pages": n_pages,
            "concepts_found": concepts,
            "concepts_known": known,
            "variants": len(content.evaluations),
        }
    )


def _content(
    inputs: Mapping[str, Manifest],
    siblings: Iterable[Manifest],
    stages: Sequence[run_view.StageFacts],
    usage: RunUsage,
    study: dict[str, Any] | None,
) -> pages.Content:
    """Read everything but the features."""
    evaluations = {
        run_view.variant_name(one): evaluation_view.read_evaluation(one.file("evaluation.json"))
        for one in (inputs["evaluate"], *siblings)
    }
    attribute = inputs["attribute"]
    attributed = read_json(attribute.file("summary.json"))
    summaries = attributed["graphs"]
    graphs = [read_graph(attribute.file(f"graph_data/{one['prompt']}.json")) for one in summaries]
    variant = run_view.variant_name(inputs["train"])
    return pages.Content(
        run=run_view.run_name(inputs["train"]),
        variant=variant,
        facts=_facts(inputs, evaluations[variant]),
        stages=stages,
        usage=usage,
        metrics=read_metrics(inputs["train"].file("metrics.jsonl")),
        evaluations=evaluations,
        task_descriptions=_task_descriptions(inputs.get("toyworld")),
        graphs=graphs,
        entries=[graph_view.graph_entry(*pair) for pair in zip(graphs, summaries, strict=True)],
        plots=[evaluate.file(name) for evaluate in (inputs["evaluate"],) for name in _plots(evaluate)],
        undefined=attributed["undefined"],
        study=study,
    )


def _plots(evaluate: Manifest) -> list[str]:
    return sorted(name for name in evaluate.files if name.endswith((".svg", ".png")))


def _facts(inputs: Mapping[str, Manifest], evaluation: evaluation_view.Evaluation) -> list[tuple[str, str]]:
    model = inputs["attribute"].config["model"]
    return [
        ("Model", model["name"] if model["source"] != "toyworld" else "toyworld, the embedded model"),
        ("Transcoder", evaluation.size),
        ("Trained on", f"{inputs['train'].config['tokens']:,} tokens"),
        ("Measured on", f"{evaluation.n_tokens:,} held-out tokens"),
    ]


def _task_descriptions(toyworld: Manifest | None) -> dict[str, str]:
    """What the tasks of the embedded model ask; other models have none."""
    if toyworld is None:
        return {}
    tasks = read_json(toyworld.file("truth.json"))["tasks"]
    return {name: task["description"] for name, task in tasks.items()}


def _write_features(
    cfg: ReportConfig,
    inputs: Mapping[str, Manifest],
    graphs: Mapping[feature_view.Key, Sequence[tuple[str, str, str]]],
    output: StageOutput,
) -> int:
    """Write the feature pages and their index; returns how many there are."""
    store = FeatureStore.open(inputs["features"])
    explanations = ExplanationStore.open(inputs["interpret"])
    keys = store.features(columns=["layer", "feature", "n_active"])
    n_active = {
        (layer, feature): n
        for layer, feature, n in zip(*(keys[name].to_pylist() for name in keys.column_names), strict=True)
    }
    chosen = feature_view.choose_pages(n_active, graphs, cfg.feature_pages)
    rows = {(row["layer"], row["feature"]): row for row in _rows_of(store, chosen)}
    index, written = feature_view.IndexColumns(), 0
    with progress("report", total=len(chosen), unit="feature pages") as bar:
        for layer, group in groupby(sorted(chosen), key=lambda key: key[0]):
            records = _records(cfg, store, explanations, rows, list(group))
            for chunk in feature_view.chunks(records, cfg.chunk_features):
                feature_view.write_chunk(output.path, layer, chunk, cfg.chunk_features, graphs, index)
                written += len(chunk)
                bar.advance(len(chunk))
    write_data(output.path, "features/index", index.columns)
    return written


def _rows_of(store: FeatureStore, keys: set[feature_view.Key]) -> Iterator[dict[str, Any]]:
    """Rows of the features table, a block in memory at a time."""
    for block in store.blocks:
        for batch in store.features(block).to_batches(max_chunksize=READ_FEATURES):
            for row in batch.to_pylist():
                if (row["layer"], row["feature"]) in keys:
                    yield row


def _records(
    cfg: ReportConfig,
    store: FeatureStore,
    explanations: ExplanationStore,
    rows: Mapping[feature_view.Key, dict[str, Any]],
    keys: Sequence[feature_view.Key],
) -> Iterator[feature_view.Sources]:
    """What the pages of some features are made of, in order, with few windows in memory at a time."""
    for start in range(0, len(keys), READ_FEATURES):
        part = keys[start : start + READ_FEATURES]
        windows, explained = store.windows_of(part), explanations.rows(set(part))
        for key in part:
            chosen = feature_view.chosen_windows(windows[key], cfg.top_windows, cfg.quantile_windows)
            yield feature_view.Sources(rows[key], explained[key], chosen)
