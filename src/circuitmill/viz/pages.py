"""Puts the page of one variant together from what the stages left.

| file | content |
|---|---|
| index.html, graph.html, features.html, feature.html | pages |
| tables.html | figures of the overview and the list of graphs, in one file that needs no other |
| data/run.js | training curves, histograms, variants |
| data/usage.js, usage.json | what jobs used: time and memory stand in these two files alone |
| data/graphs.js, data/graphs/<name>.js | list of graphs; one graph (circuit-tracer's JSON) |
| data/features/index.js | explanation, scores and density of every feature with a page |
| data/features/<layer>-<n>.js | features from n * chunk_features |
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitmill import __version__
from circuitmill.stores.graphs import write_json
from circuitmill.stores.usage import RunUsage
from circuitmill.viz import curves, evaluation_view, graph_view, study_view, usage_view
from circuitmill.viz.evaluation_view import Evaluation
from circuitmill.viz.formatting import count, number, percent
from circuitmill.viz.run_view import StageFacts, config_text
from circuitmill.viz.site import PathOf, write_data, write_site
from circuitmill.viz.summary import USAGE

VOLATILE = ("data/usage.js", USAGE)
"""Files that differ from one making to the next."""


@dataclass(frozen=True)
class Content:
    """Everything on the pages but the features, which are streamed."""

    run: str
    variant: str
    facts: Sequence[tuple[str, str]]
    """Label and value of the line below the title."""
    stages: Sequence[StageFacts]
    usage: RunUsage
    """What the stages took."""
    metrics: Sequence[Mapping[str, Any]]
    """Rows of training metrics."""
    evaluations: Mapping[str, Evaluation]
    """By variant, this one among them."""
    task_descriptions: Mapping[str, str]
    graphs: Sequence[Mapping[str, Any]]
    """Graph documents."""
    entries: Sequence[dict]
    """Their rows in the list, in the same order."""
    plots: Sequence[Path]
    undefined: str | None = None
    """Why there are no graphs."""
    study: Mapping[str, Any] | None = None
    """Comparison of variants that differ in a shared stage."""

    @property
    def evaluation(self) -> Evaluation:
        """Of this variant."""
        return self.evaluations[self.variant]


def concepts_found(entries: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Known intermediate concepts that graphs pass through, and how many there are."""
    concepts = [concept for entry in entries for concept in entry["concepts"]]
    return sum(concept["found"] for concept in concepts), len(concepts)


def tiles(content: Content) -> list[dict]:
    """The headline figures."""
    one = content.evaluation
    found, known = concepts_found(content.entries)
    correct = [entry["correct"] for entry in content.entries if entry["correct"] is not None]
    total = one.all_features
    right = f"{sum(correct)} of {len(correct)} answered as expected" if correct else "no expected answers"
    alone = "layer" if one.n_sources == one.n_layers else "token"
    rows = (
        ("ev", "Explained variance", number(one.ev, 4), "pooled over layers, held-out tokens"),
        ("l0", f"L0 per {alone}", number(one.l0 / one.n_sources), f"{number(one.l0)} active features per token in all"),
        ("dead", "Dead features", percent(one.dead / total, 1), f"{count(one.dead)} of {count(total)}"),
        (
            "agreement",
            "Agreement",
            percent(one.replacement.agreement, 1),
            one.unreplaceable or "first choice, all MLPs replaced",
        ),
        ("kl", "KL divergence", number(one.replacement.kl), one.unreplaceable or "nats, all MLPs replaced"),
        (
            "ce_recovered",
            "Cross-entropy recovered",
            percent(one.replacement.ce_recovered_zero, 1),
            one.unreplaceable or "between MLPs off and the original",
        ),
        ("graphs", "Graphs traced", count(len(content.entries)), content.undefined or right),
        (
            "concepts",
            "Known concepts found",
            f"{found} of {known}" if known else "–",
            "steps between prompt and answer",
        ),
    )
    return [dict(zip(("key", "label", "value", "note"), row, strict=True)) for row in rows]


def write_graphs(path_of: PathOf, content: Content) -> None:
    """Write the list of graphs and a data file per graph."""
    write_data(path_of, "graphs", list(content.entries))
    for document in content.graphs:
        write_data(path_of, f"graphs/{document['metadata']['slug']}", document)


def write_usage(path_of: PathOf, content: Content) -> None:
    """Write what the stages took: the only files of the page with time and memory in them."""
    page = usage_view.page_data(content.usage) | {"charts": curves.training_charts(content.metrics, curves.SPEED)}
    write_data(path_of, "usage", page)
    write_json(path_of(USAGE), usage_view.document(content.usage))


def write_overview(path_of: PathOf, content: Content, *, chunk_features: int, pages: int) -> None:
    """Write the pages and the data of the overview.

    Args:
        pages: Features with a page.
    """
    evaluation = content.evaluation
    rows = evaluation_view.variant_rows(content.variant, content.evaluations)
    write_data(
        path_of,
        "run",
        {
            "training": curves.training_charts(content.metrics),
            "histograms": evaluation_view.density_charts(evaluation),
            "variants": evaluation_view.variant_charts(rows),
        },
    )
    for plot in content.plots:
        shutil.copyfile(plot, path_of("plots", plot.name))
    listed = [
        {**entry, "thumbnail": graph_view.thumbnail(document, evaluation.n_layers)}
        for entry, document in zip(content.entries, content.graphs, strict=True)
    ]
    context = {
        "run": {
            "name": content.run,
            "variant": content.variant,
            "chunk": chunk_features,
            "n_layers": evaluation.n_layers,
            "code_version": __version__,
        },
        "facts": content.facts,
        "tiles": tiles(content),
        "circuits": graph_view.by_circuit(listed),
        "undefined": content.undefined,
        "evaluation": evaluation_view.evaluation_tables(evaluation, content.task_descriptions),
        "plots": [{"file": plot.name, "title": plot.stem.replace("_", " ")} for plot in content.plots],
        "variants": rows,
        "study": None if content.study is None else study_view.section(content.study),
        "stages": [{**vars(stage), "config": config_text(stage.config)} for stage in content.stages],
        "pages": count(pages),
        "total": count(evaluation.all_features),
    }
    write_site(path_of, context)
