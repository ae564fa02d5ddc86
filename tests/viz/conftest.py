import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.viz import synthetic

from circuitmill.stores.benchmarks import Requested
from circuitmill.stores.usage import Job, Prediction, RunUsage, by_rule, by_stage
from circuitmill.viz import feature_view, graph_view, pages
from circuitmill.viz.run_view import StageFacts
from circuitmill.viz.site import write_data

CHUNK = 64


@dataclass(frozen=True)
class Site:
    """A rendered page and what went into it."""

    results: Path
    content: pages.Content

    @property
    def report(self) -> Path:
        return self.results / "main" / "report"


def make_usage() -> RunUsage:
    """Four shards, of which one was made by hand, and a training on two GPUs that nearly filled its memory."""
    shard, train = Requested(4_000_000_000, 3600, 1, 0), Requested(1_300_000_000, 1440 * 60, 16, 2)
    jobs = [
        Job(f"cache/shard/{n}", "cache", "cache_shard", n < 3, 10.0 + n, 9.0, 700_000_000, shard if n < 3 else None, 0)
        for n in range(4)
    ]
    jobs.append(Job("main/train", "train", "run_train", True, 7200.0, 9000.5, 1_200_000_000, train, 2))
    return RunUsage(
        run="demo",
        stages=tuple(by_stage(jobs, ())),
        rules=tuple(by_rule(jobs)),
        predictions=(Prediction("train of main: memory of the GPU", 1_100_000_000, 1_200_000_000),),
    )


def make_content() -> pages.Content:
    documents, entries = [], []
    for number, (city, state, capital) in enumerate(synthetic.CITIES):
        name = f"two_hop-{number:02d}"
        document = synthetic.graph(name, city, state, capital, number)
        documents.append(document)
        entries.append(graph_view.graph_entry(document, synthetic.summary(name, "two_hop", state, capital, document)))
    document = synthetic.graph("own", "Dallas", "Texas", synthetic.NASTY, 9)
    documents.append(document)
    entries.append(graph_view.graph_entry(document, synthetic.summary("own", None, "Texas", synthetic.NASTY, document)))
    stages = [
        StageFacts("cache", 5, 90_000_000, "a" * 64, {"codec": "int8"}),
        StageFacts("train", 1, 60_000_000, "b" * 64, {"lr": 0.004, "loss": {"sparsity": 4}}),
    ]
    return pages.Content(
        run="demo",
        variant="main",
        facts=[("Model", "toyworld"), ("Trained on", "1,024,000 tokens")],
        stages=stages,
        usage=make_usage(),
        metrics=synthetic.metrics(60),
        evaluations={"main": synthetic.evaluation(), "sparse": synthetic.evaluation(14.0)},
        task_descriptions={"two_hop_city": "capital of a city's state"},
        graphs=documents,
        entries=entries,
        plots=[],
        study=synthetic.study(),
    )


def path_maker(folder: Path) -> Callable[..., Path]:
    def path_of(*parts: str) -> Path:
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    return path_of


def write_site(folder: Path, content: pages.Content) -> None:
    path_of = path_maker(folder)
    pages.write_graphs(path_of, content)
    pages.write_usage(path_of, content)
    graphs = graph_view.occurrences({d["metadata"]["slug"]: d for d in content.graphs})
    index, written = feature_view.IndexColumns(), 0
    for layer in range(synthetic.N_LAYERS):
        records = []
        for feature in range(synthetic.N_FEATURES):
            row = synthetic.feature_row(layer, feature)
            chosen = feature_view.chosen_windows(synthetic.windows(layer, feature, row["act_max"]), 12, 2)
            records.append(feature_view.Sources(row, synthetic.explanation_row(layer, feature), chosen))
        for chunk in feature_view.chunks(records, CHUNK):
            feature_view.write_chunk(path_of, layer, chunk, CHUNK, graphs, index)
            written += len(chunk)
    write_data(path_of, "features/index", index.columns)
    pages.write_overview(path_of, content, chunk_features=CHUNK, pages=written)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    results = tmp_path_factory.mktemp("results") / "demo"
    content = make_content()
    write_site(results / "main" / "report", content)
    return Site(results, content)


@pytest.fixture
def copied_site(site: Site, tmp_path: Path) -> Site:
    shutil.copytree(site.results, tmp_path / "demo")
    return Site(tmp_path / "demo", site.content)
